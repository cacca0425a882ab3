package home_test

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSmoke(t *testing.T) {
	p := newPair(t, options{})
	if err := os.WriteFile(filepath.Join(p.mnt, "a"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(p.dir, "a"))
	if err != nil || string(b) != "hello" {
		t.Fatalf("read at home: %q, %v", b, err)
	}
	t.Log(mustSh(t, alice, p.mnt, "id; echo x >b; ls -la; mkdir d; mv b d/c; ln d/c e; ln -s e f; cat f; rm -r d; stat -f .; df ."))
}
