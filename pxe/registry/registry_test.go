package registry

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func update(t *testing.T, s *Store, f func(*Tx)) {
	t.Helper()
	if err := s.Update(func(tx *Tx) error { f(tx); return nil }); err != nil {
		t.Fatal(err)
	}
}

// snapshot is all that a restart must keep.
type snapshot struct {
	View     *api.ClusterView
	Nodes    []*Node
	Nonces   []*Nonce
	Leases   []*Lease
	Rotation Rotation
	Adoption Adoption
	CA       string
}

func snap(t *testing.T, s *Store) (out snapshot) {
	t.Helper()
	err := s.View(func(tx *Tx) error {
		out = snapshot{tx.View(), tx.Nodes(), tx.Nonces(), tx.Leases(), tx.Rotation(), tx.Adoption(), identity.Pin(s.CA().Cert)}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func node(i int, state api.NodeState) *Node {
	n := &Node{NodeRecord: api.NodeRecord{
		MAC: fmt.Sprintf("52:54:00:00:00:%02x", i), Name: fmt.Sprintf("node%d", i), State: state,
		Address: fmt.Sprintf("10.77.0.%d", 100+i), Role: "node", FirstSeen: time.Unix(int64(i), 0).UTC(),
	}}
	if state == api.Approved {
		n.Node = api.NodeID(i)
		n.Certs = []Cert{{Serial: fmt.Sprintf("abc%d", i), Expires: time.Now().Add(time.Hour).UTC()}}
	}
	return n
}

// After every single change the store is opened anew and must say the same.
func TestReopenAfterEachChange(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	steps := []struct {
		name string
		do   func(*Tx)
	}{
		{"pending node", func(tx *Tx) { tx.PutNode(node(1, api.Pending)) }},
		{"nonce", func(tx *Tx) {
			tx.PutNonce(&Nonce{Value: "v", MAC: "m", Expires: time.Now().Add(time.Hour).UTC(), Key: []byte("k")})
		}},
		{"approved node", func(tx *Tx) { tx.PutNode(node(1, api.Approved)) }},
		{"second node", func(tx *Tx) { tx.PutNode(node(2, api.Approved)) }},
		{"revocation", func(tx *Tx) { n := tx.NodeByID(2); n.State = api.Revoked; tx.Revoke(n); tx.PutNode(n); tx.Rotate() }},
		{"rotation goes on", func(tx *Tx) { tx.AdvanceRotation() }},
		{"revocation in the middle", func(tx *Tx) { tx.Rotate() }},
		{"rotation ends and begins", func(tx *Tx) { tx.AdvanceRotation() }},
		{"adoption window", func(tx *Tx) {
			tx.PutAdoption(Adoption{Until: time.Now().Add(time.Hour).UTC(), Limited: true, Left: 3})
		}},
		{"lease", nil},
		{"removal", func(tx *Tx) { tx.DeleteNode(node(1, "").MAC) }},
	}
	gen := snap(t, s).View.Generation
	for _, step := range steps {
		if step.do == nil {
			if err := s.SaveLease(Lease{MAC: "m", Address: "10.77.0.130", Expires: time.Now().UTC()}); err != nil {
				t.Fatal(err)
			}
		} else {
			update(t, s, step.do)
		}
		want := snap(t, s)
		if want.View.Generation < gen {
			t.Errorf("%s: the generation went from %d to %d", step.name, gen, want.View.Generation)
		}
		gen = want.View.Generation
		s.Close()
		s = open(t, dir)
		if d := cmp.Diff(want, snap(t, s), cmpopts.EquateEmpty()); d != "" {
			t.Fatalf("%s: lost by a restart (-before +after):\n%s", step.name, d)
		}
	}
}

// The writer is killed without warning, again and again. Whatever it said was
// stored must be there, and the store must open.
func TestKillWhileWriting(t *testing.T) {
	if dir := os.Getenv("MOSIMG_TEST_WRITER"); dir != "" {
		writer(dir)
	}
	dir := t.TempDir()
	told := 0
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKillWhileWriting$")
		cmd.Env = append(os.Environ(), "MOSIMG_TEST_WRITER="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Let it tell of some writes, and then pull the plug.
		var text bytes.Buffer
		buf := make([]byte, 256)
		for strings.Count(text.String(), "\n") < 10+round*7 {
			n, err := out.Read(buf)
			if err != nil {
				t.Fatalf("writer ended: %v\n%s", err, text.String())
			}
			text.Write(buf[:n])
		}
		cmd.Process.Kill()
		rest, _ := io.ReadAll(out)
		text.Write(rest)
		cmd.Wait()
		lines := strings.Split(text.String(), "\n")
		for _, l := range lines[:len(lines)-1] { // the last one may be cut
			if n, err := strconv.Atoi(l); err == nil {
				told = max(told, n)
			}
		}
		s := open(t, dir)
		got := snap(t, s)
		byMAC := map[string]*Node{}
		for _, n := range got.Nodes {
			byMAC[n.MAC] = n
		}
		leases := map[string]bool{}
		for _, l := range got.Leases {
			leases[l.MAC] = true
		}
		for i := 1; i <= told; i++ {
			mac := writerMAC(i)
			n := byMAC[mac]
			if n == nil || int(n.Node) != i || !leases[mac] {
				t.Fatalf("round %d: write %d was told and is lost: %v", round, i, n)
			}
		}
		// A node is in the table with its number, or not at all.
		err = s.View(func(tx *Tx) error {
			for _, n := range got.Nodes {
				if back := tx.NodeByID(n.Node); back == nil || back.MAC != n.MAC {
					t.Errorf("number %d leads to %v", n.Node, back)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	t.Logf("%d writes survived 5 kills", told)
}

func writerMAC(i int) string { return fmt.Sprintf("52:54:00:00:%02x:%02x", i>>8, i&255) }

// writer is the child: it stores and tells, until it is killed.
func writer(dir string) {
	s, err := Open(dir, Options{})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for {
		mac, id := "", api.NodeID(0)
		err := s.Update(func(tx *Tx) error {
			id = tx.FreeID()
			mac = writerMAC(int(id))
			tx.PutNode(&Node{NodeRecord: api.NodeRecord{MAC: mac, Node: id, State: api.Approved, Address: "10.0.0.1"}})
			tx.Rotate()
			return nil
		})
		if err == nil {
			err = s.SaveLease(Lease{MAC: mac, Address: "10.0.0.1", Expires: time.Now()})
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(id)
	}
}

func TestNumbersLast(t *testing.T) {
	s := open(t, t.TempDir())
	update(t, s, func(tx *Tx) {
		for i := 1; i <= 3; i++ {
			tx.PutNode(node(i, api.Approved))
		}
	})
	update(t, s, func(tx *Tx) {
		n := tx.NodeByID(2)
		tx.Revoke(n)
		tx.DeleteNode(n.MAC)
	})
	update(t, s, func(tx *Tx) {
		if id := tx.FreeID(); id != 4 {
			t.Errorf("FreeID = %d while the removed node's certificate has not expired; want 4", id)
		}
	})
	s.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	update(t, s, func(tx *Tx) {
		tx.Prune()
		if id := tx.FreeID(); id != 2 {
			t.Errorf("FreeID = %d after it expired; want 2", id)
		}
		if tx.IsRevoked("abc2") {
			t.Error("an expired certificate is still listed as void")
		}
	})
}

func TestAFailedUpdateLeavesNothing(t *testing.T) {
	s := open(t, t.TempDir())
	before := snap(t, s)
	changed := s.Changed()
	boom := errors.New("boom")
	err := s.Update(func(tx *Tx) error {
		tx.PutNode(node(1, api.Approved))
		tx.Rotate()
		return boom
	})
	if !errors.Is(err, boom) {
		t.Errorf("Update = %v; want %v", err, boom)
	}
	if d := cmp.Diff(before, snap(t, s)); d != "" {
		t.Errorf("a failed update changed (-before +after):\n%s", d)
	}
	select {
	case <-changed:
		t.Error("waiters were woken for nothing")
	default:
	}
	update(t, s, func(tx *Tx) { tx.PutNode(node(1, api.Approved)) })
	select {
	case <-changed:
	default:
		t.Error("waiters were not woken")
	}
}

func TestOpenFaults(t *testing.T) {
	t.Run("two heads", func(t *testing.T) {
		dir := t.TempDir()
		open(t, dir)
		_, err := Open(dir, Options{})
		if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "another head") {
			t.Fatalf("Open = %v; want that another head has it", err)
		}
		if want := fmt.Sprintf("process %d", os.Getpid()); !strings.Contains(err.Error(), want) {
			t.Logf("the kernel does not tell who holds it: %v", err)
		}
	})
	t.Run("not a folder", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "f")
		os.WriteFile(file, nil, 0o600)
		if _, err := Open(file, Options{}); fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "--state") {
			t.Errorf("Open = %v; want a hint at --state", err)
		}
	})
	t.Run("a later format", func(t *testing.T) {
		dir := t.TempDir()
		s := open(t, dir)
		update(t, s, func(tx *Tx) { tx.putMeta(metaFormat, "99") })
		s.Close()
		if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), "format is 99") {
			t.Errorf("Open = %v; want a refusal of the format", err)
		}
	})
	for name, damage := range map[string]func([]byte) []byte{
		"empty":         func(b []byte) []byte { return nil },
		"cut short":     func(b []byte) []byte { return b[:3*4096+100] },
		"cut at a page": func(b []byte) []byte { return b[:8192] },
		"overwritten": func(b []byte) []byte {
			for i := 8192; i < len(b); i++ {
				b[i] = 0xff
			}
			return b
		},
		"text": func([]byte) []byte { return []byte("this is not a database\n") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			update(t, s, func(tx *Tx) { tx.PutNode(node(1, api.Approved)) })
			s.Close()
			file := filepath.Join(dir, FileName)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			s, err = Open(dir, Options{})
			if name == "empty" {
				// What a full disk leaves before anything was told.
				if err != nil {
					t.Fatal(err)
				}
				s.Close()
				return
			}
			if err == nil {
				s.Close()
				t.Fatal("a damaged registry was opened")
			}
			if !strings.Contains(err.Error(), "damaged") {
				t.Errorf("Open = %v; want that it is damaged", err)
			}
		})
	}
}

// A disk that is full on the first day leaves nothing that a later start
// would take for a damaged registry.
func TestFullDiskOnTheFirstDay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small disk")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("no small disk to be had: %s", out)
	}
	defer exec.Command("umount", dir).Run()
	if _, err := Open(dir, Options{}); fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("Open = %v; want that the disk is full", err)
	}
	if out, err := exec.Command("mount", "-o", "remount,size=1m", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

func TestSecretsAreRootsOnly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	open(t, dir)
	for name, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, FileName): 0o600} {
		st, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := st.Mode().Perm(); got != want {
			t.Errorf("%s has mode %o; want %o: the authority's private key is in it", name, got, want)
		}
	}
}

func TestClusterIsRenamed(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first := snap(t, s)
	s.Close()
	s, err := Open(dir, Options{Cluster: "attic"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got := snap(t, s)
	if got.View.Name != "attic" || got.CA != first.CA || got.View.Generation <= first.View.Generation {
		t.Errorf("renamed: %q, generation %d, same authority %t; want attic, above %d, true", got.View.Name, got.View.Generation, got.CA == first.CA, first.View.Generation)
	}
}
