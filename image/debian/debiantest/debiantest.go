// Package debiantest makes small signed Debian archives, so that tests can
// build from one, and from one that was tampered with, without a network.
package debiantest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// Archive is an archive in a folder, to be served by a file server or named
// by a file URL.
type Archive struct {
	Root    string // the folder
	Keyring string // file with the public key
	// Date of the suites that Publish writes.
	Date time.Time
	// ValidFor is how long after Date they are valid; 0 means for ever.
	ValidFor time.Duration

	key    *openpgp.Entity
	suites map[string][]Package
}

// Package is a package to put into an archive.
type Package struct {
	Name, Version, Arch string            // Arch "" means amd64
	Fields              map[string]string // more fields: Depends, Provides, Source ...
	Files               map[string]string // content by name; "-> TARGET" makes a symbolic link
}

// New makes an empty archive in dir with a key of its own.
func New(dir string) (*Archive, error) {
	// Signed a while ago: a signature from this second may seem to come
	// from the future to a clock that was set back.
	date := time.Now().Add(-time.Hour).UTC().Truncate(time.Second)
	key, err := openpgp.NewEntity("Test", "", "test@invalid", &packet.Config{
		Algorithm: packet.PubKeyAlgoEdDSA, Time: func() time.Time { return date.Add(-time.Hour) },
	})
	if err != nil {
		return nil, err
	}
	a := &Archive{Root: filepath.Join(dir, "debian"), Keyring: filepath.Join(dir, "keyring.gpg"), Date: date, key: key, suites: make(map[string][]Package)}
	var public bytes.Buffer
	if err := key.Serialize(&public); err != nil {
		return nil, err
	}
	return a, os.WriteFile(a.Keyring, public.Bytes(), 0o644)
}

// Add puts packages into a suite. Publish makes them visible.
func (a *Archive) Add(suite string, packages ...Package) {
	a.suites[suite] = append(a.suites[suite], packages...)
}

// Remove takes a package out of a suite, once Publish is called.
func (a *Archive) Remove(suite, name string) {
	a.suites[suite] = slices.DeleteFunc(a.suites[suite], func(p Package) bool { return p.Name == name })
}

// Pool is where the .deb of a package lies under Root.
func (p Package) Pool() string {
	return fmt.Sprintf("pool/main/%s_%s_%s.deb", p.Name, p.Version, p.arch())
}

func (p Package) arch() string {
	if p.Arch == "" {
		return "amd64"
	}
	return p.Arch
}

// Publish writes the packages, index and InRelease of every suite.
func (a *Archive) Publish() error {
	for suite, packages := range a.suites {
		var index strings.Builder
		for _, p := range packages {
			deb := Deb(p.Files)
			if err := a.Write(p.Pool(), deb); err != nil {
				return err
			}
			fmt.Fprintf(&index, "Package: %s\nVersion: %s\nArchitecture: %s\nFilename: %s\nSize: %d\nSHA256: %x\n",
				p.Name, p.Version, p.arch(), p.Pool(), len(deb), sha256.Sum256(deb))
			for _, k := range keys(p.Fields) {
				fmt.Fprintf(&index, "%s: %s\n", k, p.Fields[k])
			}
			index.WriteString("\n")
		}
		packed := gz([]byte(index.String()))
		const name = "main/binary-amd64/Packages.gz"
		if err := a.Write("dists/"+suite+"/"+name, packed); err != nil {
			return err
		}
		release := fmt.Sprintf("Origin: Test\nSuite: stable\nCodename: %s\nDate: %s\n", suite, a.Date.Format(time.RFC1123))
		if a.ValidFor != 0 {
			release += fmt.Sprintf("Valid-Until: %s\n", a.Date.Add(a.ValidFor).Format(time.RFC1123))
		}
		release += fmt.Sprintf("SHA256:\n %x %d %s\n", sha256.Sum256(packed), len(packed), name)
		signed, err := a.Sign(release)
		if err != nil {
			return err
		}
		if err := a.Write("dists/"+suite+"/InRelease", signed); err != nil {
			return err
		}
	}
	return nil
}

// Sign clear-signs a text with the archive's key.
func (a *Archive) Sign(text string) ([]byte, error) {
	var b bytes.Buffer
	w, err := clearsign.Encode(&b, a.key.PrivateKey, &packet.Config{Time: func() time.Time { return a.Date }})
	if err != nil {
		return nil, err
	}
	if _, err := w.Write([]byte(text)); err != nil {
		return nil, err
	}
	err = w.Close()
	return b.Bytes(), err
}

// Write stores a file under Root.
func (a *Archive) Write(name string, data []byte) error {
	path := filepath.Join(a.Root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}

// Deb packs files into a package.
func Deb(files map[string]string) []byte {
	var data bytes.Buffer
	t := tar.NewWriter(&data)
	for _, name := range keys(files) {
		h := &tar.Header{Name: "./" + name, Mode: 0o755, Typeflag: tar.TypeReg, Size: int64(len(files[name]))}
		target, link := strings.CutPrefix(files[name], "-> ")
		if link {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, target, 0
		}
		must(t.WriteHeader(h))
		if !link {
			_, err := t.Write([]byte(files[name]))
			must(err)
		}
	}
	must(t.Close())
	return Ar("debian-binary", []byte("2.0\n"), "control.tar.gz", gz(nil), "data.tar.gz", gz(data.Bytes()))
}

// Ar packs name, []byte pairs as dpkg-deb does.
func Ar(members ...any) []byte {
	var b bytes.Buffer
	b.WriteString("!<arch>\n")
	for i := 0; i < len(members); i += 2 {
		data := members[i+1].([]byte)
		fmt.Fprintf(&b, "%-16s%-12d%-6d%-6d%-8o%-10d`\n", members[i], 0, 0, 0, 0o100644, len(data))
		b.Write(data)
		if len(data)%2 == 1 {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

func gz(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(data)
	must(err)
	must(w.Close())
	return b.Bytes()
}

// must is for writes into memory.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func keys(m map[string]string) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}
