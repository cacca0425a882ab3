// Package configs holds the defaults that are built into mosimg: what images
// are made from, by profile.
package configs

import "embed"

// Profiles are the built-in profiles: profiles/NAME.yaml.
//
//go:embed profiles/*.yaml
var Profiles embed.FS
