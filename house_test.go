package mosimg

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// packages parses every package of the module, tests left out.
func packages(t *testing.T) map[string][]*ast.File {
	t.Helper()
	pkgs := make(map[string][]*ast.File)
	fset := token.NewFileSet()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if path != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "out") {
				return fs.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil && path != "." {
				return fs.SkipDir // a module of its own
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(path))
		pkgs[dir] = append(pkgs[dir], f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(pkgs) < 10 {
		t.Fatalf("found %d packages: the walk is broken", len(pkgs))
	}
	return pkgs
}

// A reader who opens a folder must learn in plain sentences what is in it.
func TestEveryPackageHasADoc(t *testing.T) {
	for dir, files := range packages(t) {
		var doc string
		for _, f := range files {
			if f.Doc != nil {
				doc += f.Doc.Text()
			}
		}
		if len(doc) < 40 {
			t.Errorf("package %s has no package doc, or one too short to help: %q", dir, doc)
		}
	}
}

// The house's one rule on imports: downwards only, and image, pxe and agent
// (the three floors) share nothing but leaves. Whoever breaks it makes the
// node's program carry the builder, or the head the agent.
func TestImportsRunDownwards(t *testing.T) {
	floors := []string{"image", "initramfs", "pxe", "agent", "qemu-tests"}
	floor := func(path string) string {
		top, _, _ := strings.Cut(path, "/")
		for _, f := range floors {
			if top == f {
				return f
			}
		}
		return ""
	}
	allowed := map[string]string{"image": "initramfs"} // the builder uses the archive maker
	for dir, files := range packages(t) {
		from := floor(dir)
		for _, f := range files {
			for _, im := range f.Imports {
				path, ours := strings.CutPrefix(strings.Trim(im.Path.Value, `"`), "mosimg/")
				if !ours {
					continue
				}
				to := floor(path)
				switch {
				case strings.HasPrefix(path, "cmd/"):
					t.Errorf("%s imports %s: nothing imports a command", dir, path)
				case from != "" && to != "" && from != to && allowed[from] != to:
					t.Errorf("%s imports %s: floors do not import each other; share a leaf in internal/", dir, path)
				case from != "" && path == "internal/cli":
					t.Errorf("%s imports %s: that is upwards", dir, path)
				case (dir == "cmd/mosagent" || dir == "internal/nodecli") && to != "" && to != "agent":
					t.Errorf("%s imports %s: the node's program must stay small", dir, path)
				case strings.HasPrefix(dir, "internal/") && dir != "internal/cli" && dir != "internal/nodecli" && to != "":
					t.Errorf("%s imports %s: leaves do not import floors", dir, path)
				}
			}
		}
	}
}
