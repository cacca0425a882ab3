// Package debian reads a signed Debian archive: it finds a mirror in the
// host's own apt configuration, verifies the index of each suite by OpenPGP,
// looks packages and their dependencies up in it, fetches them by hash and
// reads what is inside.
//
// There is no unsigned path: whatever leaves this package was named, by
// SHA-256, in an InRelease file that a key of the keyring signed. Downloads
// are kept in a Cache by content, so nothing is fetched twice.
//
// It installs nothing, runs no maintainer script and needs neither apt, dpkg
// nor root.
package debian

import "embed"

// Source is this package's code: results in the build cache depend on it.
//
//go:embed *.go
var Source embed.FS
