package image

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"mosimg/image/debian"
	"mosimg/image/steps"
	"mosimg/initramfs/archive"
	"mosimg/initramfs/elfclosure"
)

// content is the files of some packages, in memory.
type content struct {
	files     map[string]*contentFile // by name, with merged /usr
	copyright map[string][]byte       // by package
	docLinks  map[string]string       // usr/share/doc/NAME that is a link to another's
}

type contentFile struct {
	pkg      *debian.Package
	mode     fs.FileMode
	data     []byte
	link     string
	hardLink bool
}

// open fetches packages and reads the files that want names, and always the
// copyright files.
func (b *builder) open(ctx context.Context, job *steps.Job, packages []*debian.Package, want func(name string) bool) (*content, error) {
	debs, err := b.fetch(ctx, job, packages)
	if err != nil {
		return nil, err
	}
	c := &content{files: make(map[string]*contentFile), copyright: make(map[string][]byte), docLinks: make(map[string]string)}
	for i, pkg := range packages {
		err := debian.WalkDeb(ctx, debs[i], func(f *debian.DebFile) error {
			if of := copyrightOf(f.Name); of != "" && f.Body != nil {
				data, err := io.ReadAll(f.Body)
				c.copyright[of] = data
				return err
			}
			if dir, doc := strings.CutPrefix(f.Name, "usr/share/doc/"); doc && f.Mode&fs.ModeSymlink != 0 {
				c.docLinks[dir] = path.Base(f.Linkname)
			}
			name := archive.Merge(f.Name)
			if f.Mode.IsDir() || documentation(name) || !want(name) {
				return nil
			}
			file := &contentFile{pkg: pkg, mode: f.Mode, link: f.Linkname, hardLink: f.HardLink}
			if f.Body != nil {
				var err error
				if file.data, err = io.ReadAll(f.Body); err != nil {
					return err
				}
			}
			c.files[name] = file
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

// read is the content of a file, symbolic links followed.
func (c *content) read(name string) ([]byte, error) {
	for range 16 {
		f := c.files[name]
		switch {
		case f == nil:
			return nil, fmt.Errorf("there is no %s in it", name)
		case f.mode&fs.ModeSymlink != 0 && path.IsAbs(f.link):
			name = archive.Merge(strings.TrimPrefix(path.Clean(f.link), "/"))
		case f.mode&fs.ModeSymlink != 0:
			name = path.Join(path.Dir(name), f.link)
		case f.hardLink:
			name = archive.Merge(f.link)
		default:
			return f.data, nil
		}
	}
	return nil, fmt.Errorf("%s: too many links", name)
}

// elf is the files as the library resolver wants them.
func (c *content) elf() elfclosure.Files {
	m := make(elfclosure.Files, len(c.files))
	for name, f := range c.files {
		e := elfclosure.File{Data: f.data, Link: f.link}
		if f.hardLink {
			e.Link = "/" + archive.Merge(f.link)
		}
		m[name] = e
	}
	return m
}

// licences gives the licence names of packages. Some packages of one source
// share a documentation folder by a link.
func (c *content) licences(packages ...*debian.Package) map[string]string {
	m := make(map[string]string)
	for _, p := range packages {
		text, ok := c.copyright[p.Name]
		if !ok {
			text = c.copyright[c.docLinks[p.Name]]
		}
		m[p.Name] = debian.Licences(text)
	}
	return m
}
