package httpd

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mosimg/pxe/images"
	"mosimg/pxe/imagetest"
)

// A machine that is in the middle of a download when a new image is published
// gets the old one to its end, also when the old folder is gone by then.
func TestDownloadDuringPublish(t *testing.T) {
	dir := t.TempDir()
	files := imagetest.Files("one")
	kernel := strings.Repeat("kernel one ", 2<<20) // far more than sockets hold
	files["vmlinuz"] = kernel
	old := imagetest.Publish(t, dir, "amd64", files)
	store, err := images.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	ts := httptest.NewServer((&Server{Images: store}).Handler())
	defer ts.Close()
	resp, err := http.Get(ts.URL + "/i/" + imagetest.Sum(kernel) + "/vmlinuz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	h := sha256.New()
	if _, err := io.CopyN(h, resp.Body, 1000); err != nil {
		t.Fatal(err)
	}
	fresh := imagetest.Publish(t, dir, "amd64", imagetest.Files("two"))
	if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
		t.Fatal(err)
	}
	if got := store.Pick().Manifest.ID; got != fresh {
		t.Errorf("%.8s is served; want the new set", got)
	}
	if _, err := io.Copy(h, resp.Body); err != nil || hex.EncodeToString(h.Sum(nil)) != imagetest.Sum(kernel) {
		t.Errorf("the download ended with %v and other bytes than it began with", err)
	}
}

// fromFile is a connection that notes whether it was given a file, which the
// kernel then sends by itself, or bytes.
type fromFile struct {
	*httptest.ResponseRecorder
	file bool
}

func (f *fromFile) ReadFrom(r io.Reader) (int64, error) {
	if l, ok := r.(*io.LimitedReader); ok {
		_, f.file = l.R.(*os.File)
	}
	return io.Copy(f.ResponseRecorder, r)
}

// Boot files go from the page cache to the socket. A wrapper around either
// that nobody notices would make the head copy every byte twice.
func TestSendfile(t *testing.T) {
	dir := t.TempDir()
	imagetest.Make(t, dir, "amd64", imagetest.Files("one"))
	store, err := images.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Images: store}
	for path, header := range map[string]string{"/i/" + imagetest.Sum("kernel one") + "/vmlinuz": "", "/boot/snponly.efi": "bytes=3-"} {
		r := httptest.NewRequest("GET", path, nil)
		if header != "" {
			r.Header.Set("Range", header)
		}
		w := &fromFile{ResponseRecorder: httptest.NewRecorder()}
		s.Handler().ServeHTTP(w, r)
		if !w.file || w.Body.Len() == 0 {
			t.Errorf("GET %s %s: %d bytes, a file for the kernel to send: %t", path, header, w.Body.Len(), w.file)
		}
	}
}

// busybox wget is what a small initramfs has; it goes on where it was cut off.
func TestBusyboxWget(t *testing.T) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox is not installed")
	}
	ts, _ := newServer(t, nil)
	out := filepath.Join(t.TempDir(), "k")
	if err := os.WriteFile(out, []byte("kern"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(busybox, "wget", "-q", "-c", "-O", out, ts.URL+"/i/"+imagetest.Sum("kernel one")+"/vmlinuz")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if got, err := os.ReadFile(out); err != nil || string(got) != "kernel one" {
		t.Errorf("got %q, %v; want the whole kernel", got, err)
	}
}

// Whatever a client asks for, it gets a reply and no file outside the set.
func FuzzRequest(f *testing.F) {
	f.Add("GET", "/i/"+imagetest.Sum("kernel one")+"/vmlinuz", "bytes=0-3,5-")
	f.Add("GET", "/boot/..%2fvmlinuz", "bytes=-99999999999999999999")
	f.Add("HEAD", "/ipxe/52:54:00:00:00:01", "")
	dir := f.TempDir()
	imagetest.Make(f, dir, "amd64", imagetest.Files("one"))
	store, err := images.Open(dir, nil)
	if err != nil {
		f.Fatal(err)
	}
	handler := (&Server{Images: store, Script: nil}).Handler()
	f.Fuzz(func(t *testing.T, method, path, ranges string) {
		if strings.HasPrefix(path, "/ipxe/") && method == "GET" {
			return // the script's own tests
		}
		r, err := http.NewRequest(method, "http://head/", nil)
		if err != nil {
			return
		}
		r.URL.Path, r.RemoteAddr = path, "10.0.0.1:1"
		r.Header.Set("Range", ranges)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if w.Code == http.StatusOK && strings.Contains(w.Body.String(), "head archive") {
			t.Errorf("%s %q serves the head archive", method, path)
		}
		if w.Code < 200 || w.Code >= 500 && w.Code != http.StatusNotImplemented {
			t.Errorf("%s %q: status %d", method, path, w.Code)
		}
	})
}
