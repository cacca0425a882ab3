package leak

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	bolt "go.etcd.io/bbolt"

	"mosimg/internal/identity"
	"mosimg/internal/imageset"
)

// fakeHead writes a database in the form of a head's, and returns what is in it.
func fakeHead(t *testing.T) (name string, ca *identity.CA, gossip []byte, nonce string) {
	t.Helper()
	ca, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	pem, err := identity.MarshalKey(ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	gossip = make([]byte, 32)
	rand.Read(gossip)
	nonce = rand.Text()
	rotation, _ := json.Marshal(map[string]any{"phase": 0, "new": gossip})
	record, _ := json.Marshal(map[string]any{"nonce": nonce, "mac": "52:54:00:77:01:01", "image": strings.Repeat("a", 64),
		"inventory": map[string]any{"cpu_model": "QEMU Virtual CPU"}})
	name = filepath.Join(t.TempDir(), "head.db")
	db, err := bolt.Open(name, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error {
		for bucket, entries := range map[string]map[string][]byte{
			"meta":  {"ca-key": pem, "ca-cert": ca.Cert.Raw, "gossip": rotation, "cluster": []byte("mosimg-cluster"), "format": []byte("1")},
			"nodes": {"52:54:00:77:01:01": record},
		} {
			b, err := tx.CreateBucket([]byte(bucket))
			if err != nil {
				return err
			}
			for k, v := range entries {
				if err := b.Put([]byte(k), v); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return name, ca, gossip, nonce
}

func zst(b []byte) []byte {
	w, _ := zstd.NewWriter(nil)
	return w.EncodeAll(b, nil)
}

func gz(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

// noise is data that does not compress, as most of an image.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// Each secret must be found in each wrapping that an image has: a search that
// finds nothing because it looks at compressed bytes proves nothing.
func TestScanFindsWhatIsHidden(t *testing.T) {
	name, ca, gossip, nonce := fakeHead(t)
	secrets, err := Secrets(name)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := (*ecdsa.PrivateKey)(ca.Key).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	pin := strings.TrimPrefix(identity.Pin(ca.Cert), "sha256:")
	wrap := map[string]func([]byte) []byte{
		"plain":       func(b []byte) []byte { return b },
		"second zstd": func(b []byte) []byte { return slices.Concat(zst(noise(100)), make([]byte, 3), zst(b), noise(10)) },
		"zstd in zstd": func(b []byte) []byte {
			return zst(slices.Concat(noise(10), zst(slices.Concat(noise(1000), b)), noise(10)))
		},
		"gzip in zstd": func(b []byte) []byte { return zst(slices.Concat(noise(10), gz(b))) },
		"tar":          tarOf,
	}
	for secret, b := range map[string][]byte{
		"gossip key": gossip, "nonce": []byte(nonce), "private scalar": scalar, "pin": []byte(pin),
		"gossip key in hex": []byte(hex.EncodeToString(gossip)), "MAC": []byte("52:54:00:77:01:01"),
	} {
		for how, f := range wrap {
			set := fakeSet(t, f(slices.Concat(noise(50), b, noise(50))))
			found, _, err := Scan(t.Context(), set, secrets)
			if err != nil || len(found) == 0 || found[0].File != imageset.Initramfs {
				t.Errorf("Scan for the %s, %s = %v, %v; want it found", secret, how, found, err)
			}
		}
	}
	clean := fakeSet(t, zst([]byte("mosimg-cluster QEMU Virtual CPU "+strings.Repeat("a", 64))))
	if found, n, err := Scan(t.Context(), clean, secrets); err != nil || len(found) > 0 || n == 0 {
		t.Errorf("Scan of a clean set = %v, %d, %v; want nothing", found, n, err)
	}
}

func tarOf(b []byte) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	w.WriteHeader(&tar.Header{Name: "x", Size: int64(len(b)), Mode: 0o600, ModTime: time.Unix(0, 0)})
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func fakeSet(t *testing.T, initramfs []byte) *imageset.Set {
	t.Helper()
	dir := t.TempDir()
	m := &imageset.Manifest{Files: []imageset.File{{Name: imageset.Initramfs}}}
	for name, b := range map[string][]byte{imageset.ManifestName: []byte("{}"), imageset.Initramfs: initramfs} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &imageset.Set{Dir: dir, Manifest: m}
}

func TestSecretsRefusesOtherDatabases(t *testing.T) {
	name := filepath.Join(t.TempDir(), "x.db")
	db, err := bolt.Open(name, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	if _, err := Secrets(name); err == nil {
		t.Error("Secrets of an empty database succeeded: a search for nothing finds nothing")
	}
}
