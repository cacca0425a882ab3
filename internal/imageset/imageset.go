// Package imageset reads and checks image sets: the output folder of one
// build. The builder writes them, the head serves them, the lab boots them.
//
//	DIR/manifest.json
//	DIR/vmlinuz
//	DIR/initramfs
//	DIR/boot/{undionly.kpxe,ipxe.pxe,snponly.efi,ipxe.efi}
//	DIR/head.cpio
//	DIR/mosimg.{efi,img,iso,qcow2}     when they were asked for
//
// A store of sets is a folder with one set per sub-folder, named by its id,
// and a link current-ARCH for each architecture that names the served one.
package imageset

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
)

// Names of the files of a set.
const (
	ManifestName = "manifest.json"
	Kernel       = "vmlinuz"
	Initramfs    = "initramfs"
	HeadArchive  = "head.cpio"
	BootDir      = "boot"
	// What machines boot that do not boot from the network.
	UKI   = "mosimg.efi"
	Disk  = "mosimg.img"
	ISO   = "mosimg.iso"
	QCOW2 = "mosimg.qcow2"
)

// Served says whether a file of a set is what a head serves to nodes: all but
// the head archive and the boot media, which hold the rest of the set.
func Served(name string) bool {
	switch name {
	case HeadArchive, UKI, Disk, ISO, QCOW2:
		return false
	}
	return true
}

// Format is the version of the manifest; another one is refused.
const Format = 1

// Manifest describes one image set.
type Manifest struct {
	Format  int    `json:"format"`
	ID      string `json:"id"` // see ComputeID
	Profile string `json:"profile"`
	Arch    string `json:"arch"` // GOARCH: amd64, 386
	Version string `json:"version"`
	// Created is SOURCE_DATE_EPOCH or the newest date of the package index;
	// never the time of the build, so that equal inputs give equal bytes.
	Created       time.Time `json:"created"`
	KernelRelease string    `json:"kernel_release"`
	CRIUVersion   string    `json:"criu_version,omitempty"`
	Compression   string    `json:"compression"` // of initramfs: zstd, xz, none
	KernelArgs    []string  `json:"kernel_args,omitempty"`
	Files         []File    `json:"files"`    // sorted by name; without the manifest
	Packages      []Package `json:"packages"` // what the files were made from, sorted by name
	GoModules     []Module  `json:"go_modules,omitempty"`
	Parts         []Part    `json:"parts,omitempty"` // sizes by part
}

// File is one file of a set. Name is relative, with slashes.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Package is one Debian package that went into the set.
type Package struct {
	Name     string `json:"name"`
	Version  string `json:"version"`
	Arch     string `json:"arch"`
	Source   string `json:"source"` // source package and version: "linux 6.12.1-1"
	Suite    string `json:"suite"`
	Filename string `json:"filename"` // in the archive's pool
	SHA256   string `json:"sha256"`   // of the .deb
	Licence  string `json:"licence"`  // short names from debian/copyright, "see copyright" when it is not machine-readable
	Used     string `json:"used"`     // node, head, boot
}

// Module is one Go module linked into the agent or the utilities.
type Module struct {
	Path    string `json:"path"`
	Version string `json:"version"`
	Sum     string `json:"sum,omitempty"`
}

// Part says what one part of the payload weighs.
type Part struct {
	Name       string `json:"name"`
	Size       int64  `json:"size"`       // unpacked bytes
	Compressed int64  `json:"compressed"` // bytes in the image, 0 when shared with others
}

// ComputeID names a set by content: SHA-256 over what a node boots (kernel,
// initramfs, boot loaders, kernel arguments), as 64 hex digits. What is made
// of these is left out: the head archive and the boot media contain the set.
func (m *Manifest) ComputeID() string {
	h := sha256.New()
	files := append([]File(nil), m.Files...)
	sort.Slice(files, func(i, j int) bool { return files[i].Name < files[j].Name })
	fmt.Fprintf(h, "mosimg image set %d\narch %s\n", Format, m.Arch)
	for _, f := range files {
		if Served(f.Name) {
			fmt.Fprintf(h, "file %s %s\n", f.SHA256, f.Name)
		}
	}
	for _, a := range m.KernelArgs {
		fmt.Fprintf(h, "arg %q\n", a)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// File is the entry of that name.
func (m *Manifest) File(name string) (File, bool) {
	for _, f := range m.Files {
		if f.Name == name {
			return f, true
		}
	}
	return File{}, false
}

// WithoutHead is the manifest of the same set without its head archive and
// boot media: what is inside the head archive and on a head.
func (m *Manifest) WithoutHead() *Manifest {
	c := *m
	c.Files = nil
	for _, f := range m.Files {
		if Served(f.Name) {
			c.Files = append(c.Files, f)
		}
	}
	return &c
}

// Marshal is the manifest as it is stored.
func (m *Manifest) Marshal() ([]byte, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// Write stores the manifest in dir, atomically.
func (m *Manifest) Write(dir string) error {
	b, err := m.Marshal()
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, ManifestName), b, 0o644)
}

// Set is an image set on disk.
type Set struct {
	Dir      string
	Manifest *Manifest
}

// Path is the path of one of the set's files.
func (s *Set) Path(name string) string { return filepath.Join(s.Dir, filepath.FromSlash(name)) }

const maxManifest = 64 << 20

// ParseManifest reads a manifest and checks that it can be served: format,
// id, file names that stay inside the set.
func ParseManifest(data []byte) (*Manifest, error) {
	m := new(Manifest)
	if err := json.Unmarshal(data, m); err != nil {
		return nil, err
	}
	var l fault.List
	if m.Format != Format {
		l.Addf("format is %d, this mosimg reads %d", m.Format, Format)
	}
	for _, f := range m.Files {
		if !fs.ValidPath(f.Name) || f.Name == "." || strings.Contains(f.Name, "\\") || path.Clean(f.Name) != f.Name {
			l.Addf("file name %q is not a plain relative path", f.Name)
		}
		if len(f.SHA256) != 64 {
			l.Addf("file %s has no SHA-256", f.Name)
		}
	}
	for _, need := range []string{Kernel, Initramfs} {
		if _, ok := m.File(need); !ok {
			l.Addf("no %s in it", need)
		}
	}
	if l.Len() == 0 && m.ID != m.ComputeID() {
		l.Addf("id is %.12s, its files give %.12s", m.ID, m.ComputeID())
	}
	return m, l.Err(fault.Untrusted, "read manifest", "", "build the image set again")
}

// Open reads the set in dir. Sizes are checked; hashes only by Verify.
func Open(dir string) (*Set, error) {
	name := filepath.Join(dir, ManifestName)
	f, err := os.Open(name)
	if err != nil {
		if os.IsNotExist(err) {
			return nil, fault.New(fault.NotFound, "open image set", dir, "there is no "+ManifestName, "make one with: mosimg build -o "+dir)
		}
		return nil, fault.New(fault.Environment, "open image set", dir, err, "")
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return nil, fault.New(fault.Environment, "open image set", dir, err, "")
	}
	m, err := ParseManifest(data)
	if err != nil {
		return nil, fmt.Errorf("open image set %s: %w", dir, err)
	}
	s := &Set{Dir: dir, Manifest: m}
	var l fault.List
	for _, f := range m.Files {
		st, err := os.Stat(s.Path(f.Name))
		switch {
		case err != nil:
			l.Add(err)
		case !st.Mode().IsRegular():
			l.Addf("%s is not a regular file", f.Name)
		case st.Size() != f.Size:
			l.Addf("%s has %d bytes, the manifest says %d", f.Name, st.Size(), f.Size)
		}
	}
	return s, l.Err(fault.Untrusted, "open image set", dir, "build the image set again")
}

// Verify compares every file with its hash.
func (s *Set) Verify() error {
	var l fault.List
	for _, f := range s.Manifest.Files {
		sum, _, err := HashFile(s.Path(f.Name))
		if err != nil {
			l.Add(err)
		} else if sum != f.SHA256 {
			l.Addf("%s has SHA-256 %.12s, the manifest says %.12s", f.Name, sum, f.SHA256)
		}
	}
	return l.Err(fault.Untrusted, "verify image set", s.Dir, "build the image set again")
}

// HashFile is the hex SHA-256 and the size of a file.
func HashFile(name string) (string, int64, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return "", 0, fmt.Errorf("read %s: %w", name, err)
	}
	return hex.EncodeToString(h.Sum(nil)), n, nil
}

// CurrentLink is the name of the link in a store that names the set served
// for arch.
func CurrentLink(arch string) string { return "current-" + arch }

// OpenStore opens what a head serves: the current set of each architecture in
// a store, or dir itself when it is a single image set. The key is the arch.
func OpenStore(dir string) (map[string]*Set, error) {
	if _, err := os.Stat(filepath.Join(dir, ManifestName)); err == nil {
		s, err := Open(dir)
		if err != nil {
			return nil, err
		}
		return map[string]*Set{s.Manifest.Arch: s}, nil
	}
	links, _ := filepath.Glob(filepath.Join(dir, CurrentLink("*")))
	sets := make(map[string]*Set)
	for _, l := range links {
		// Resolve the link once: a publish may change it at any moment,
		// and a set must not be read half from the old and half from the new.
		real, err := filepath.EvalSymlinks(l)
		if err != nil {
			return nil, fault.New(fault.Environment, "open image store", dir, err, "")
		}
		s, err := Open(real)
		if err != nil {
			return nil, err
		}
		if arch := strings.TrimPrefix(filepath.Base(l), CurrentLink("")); arch != s.Manifest.Arch {
			return nil, fault.New(fault.Untrusted, "open image store", dir, fmt.Sprintf("%s names a set for %s", filepath.Base(l), s.Manifest.Arch), "")
		}
		sets[s.Manifest.Arch] = s
	}
	if len(sets) == 0 {
		return nil, fault.New(fault.NotFound, "open image store", dir, "no image set in it", "make one with: mosimg build, and name its folder with --images")
	}
	return sets, nil
}
