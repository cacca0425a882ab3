package debian

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// hostWith makes a root folder with apt files.
func hostWith(t *testing.T, files map[string]string) *Host {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, "etc/apt", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return ReadHost(t.Context(), root)
}

func TestReadHost(t *testing.T) {
	h := hostWith(t, map[string]string{
		"sources.list": `
deb http://one/debian/ bookworm main # comment
deb-src http://src/debian bookworm main
deb [arch=amd64 signed-by=/x] https://two/deb trixie-updates main
deb cdrom:[Debian]/ bookworm main
deb [broken http://three/debian bookworm main
# deb http://off/debian bookworm main
deb http://security.one/debian-security bookworm-security main
deb http://old.security/debian-security buster/updates main
deb file:/srv/mirror stable main
`,
		"sources.list.d/b.list":         "deb https://packages.example/apt cloud main\ndeb http://ubuntu.example/ubuntu noble main\n",
		"sources.list.d/debian.sources": "Types: deb deb-src\nURIs: http://one/debian http://four/debian\nSuites: bookworm bookworm-backports\nComponents: main\n\nTypes: deb\nURIs: http://sec2/debian-security\nSuites: bookworm-security\n\nEnabled: no\nTypes: deb\nURIs: http://no/debian\nSuites: trixie\n",
		"sources.list.d/bad.sources":    "this is not a control file\n",
		"sources.list.d/x.list.save":    "deb http://saved/debian trixie main\n",
	})
	want := []string{"http://one/debian", "https://two/deb", "file:/srv/mirror", "http://four/debian"}
	if diff := cmp.Diff(want, h.Mirrors); diff != "" {
		t.Errorf("Mirrors (-want +got):\n%s", diff)
	}
	want = []string{"http://security.one/debian-security", "http://old.security/debian-security", "http://sec2/debian-security"}
	if diff := cmp.Diff(want, h.Security); diff != "" {
		t.Errorf("Security (-want +got):\n%s", diff)
	}
}

func TestHostWithoutApt(t *testing.T) {
	if h := hostWith(t, nil); len(h.Mirrors)+len(h.Security) != 0 {
		t.Errorf("ReadHost of an empty root = %+v", h)
	}
}

func TestProxiesOfApt(t *testing.T) {
	h := &Host{proxies: parseProxies(`APT "";
Acquire::http::Proxy "http://proxy:3142";
Acquire::http::Proxy::Direct.example "DIRECT";
Acquire::http::Proxy::special "http://other:1";
Acquire::https::Timeout "5";
`)}
	for url, want := range map[string]string{
		"http://mirror/debian":    "http://proxy:3142",
		"http://direct.example/x": "",
		"http://special/x":        "http://other:1",
	} {
		got, err := h.Proxy(httptest.NewRequest(http.MethodGet, url, nil))
		if err != nil || (got == nil) != (want == "") || got != nil && got.String() != want {
			t.Errorf("Proxy(%s) = %v, %v; want %q", url, got, err, want)
		}
	}
}

func TestSecurityRoots(t *testing.T) {
	h := &Host{Security: []string{"http://host/debian-security"}}
	if diff := cmp.Diff([]string{"http://host/debian-security", "http://m/debian-security"}, h.securityRoots("http://m/debian", false)); diff != "" {
		t.Errorf("host's mirror (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"http://m/debian-security", "http://host/debian-security"}, h.securityRoots("http://m/debian", true)); diff != "" {
		t.Errorf("--mirror (-want +got):\n%s", diff)
	}
}
