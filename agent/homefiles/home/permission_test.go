package home_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/home"
	"mosimg/agent/homefiles/wire"
	"mosimg/internal/api"
)

// Whoever the job is on the node, home's kernel has the last word.
func TestPermissionsAreThoseOfTheCaller(t *testing.T) {
	p := newPair(t, options{users: []home.Cred{alice, bob}})
	d := func(n string) string { return filepath.Join(p.dir, n) }
	write := func(n string, uid, gid int, mode os.FileMode) {
		os.WriteFile(d(n), []byte(n), 0o600)
		os.Chown(d(n), uid, gid)
		os.Chmod(d(n), mode)
	}
	write("alice", 1000, 1000, 0o600)
	write("bob", 1001, 1001, 0o600)
	write("root", 0, 0, 0o600)
	write("group", 0, 2000, 0o660)
	os.Mkdir(d("shared"), 0o755)
	os.Chown(d("shared"), 0, 2000)
	unix.Chmod(d("shared"), 0o2770)
	for _, tc := range []struct {
		who    home.Cred
		script string
		want   string // in its output; "" for success
	}{
		{alice, "cat alice; echo x >>alice", ""},
		{alice, "cat bob", "denied"},
		{bob, "cat alice", "denied"},
		{alice, "cat root", "denied"},
		{alice, "echo more >>group; cat group", ""},
		{bob, "cat group", "denied"},
		{alice, "echo x >shared/by-alice; mkdir shared/dir", ""},
		{bob, "ls shared", "denied"},
		{bob, "rm -f alice", "not permitted"}, // sticky
		{alice, "chown 1001 alice", "not permitted"},
		{alice, "chgrp 3000 alice; chmod 2700 alice", ""},
		{bob, "ln alice stolen", "not permitted"}, // protected_hardlinks of home, or of the node
		// The node's root is nobody special at home: the capsule's owner.
		{root, "cat alice", ""},
		{root, "cat root", "denied"},
		{root, "cat bob", "denied"},
		{root, "echo x >by-root", ""},
		{root, "chown 0 alice", "not permitted"},
		// A user who is not the capsule's gets nothing, not even a listing.
		{home.Cred{UID: 1002, GID: 1002}, "ls", "not permitted"},
		// Nor does a group that its users are not in.
		{home.Cred{UID: 1000, GID: 4000}, "cat alice", "not permitted"},
	} {
		out, err := sh(t, tc.who, p.mnt, tc.script)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(out, tc.want)) {
			t.Errorf("uid %d: %s: %v %q; want %q", tc.who.UID, tc.script, err, out, tc.want)
		}
	}
	for n, want := range map[string]string{"shared/by-alice": "1000 2000", "shared/dir": "1000 2000", "by-root": "1000 1000"} {
		if got := strings.TrimSpace(mustSh(t, root, p.dir, "stat -c '%u %g' "+n)); got != want {
			t.Errorf("%s belongs to %s; want %s", n, got, want)
		}
	}
	if got := mustSh(t, root, p.dir, "stat -c %a shared/dir"); got != "2755\n" {
		t.Errorf("directory in a setgid directory has mode %s", got)
	}
}

// node is a peer that says whatever it likes.
type node struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
	seq  uint64
}

// greet connects to a server as a node, with any greeting.
func greet(t *testing.T, srv *home.Server, peer api.NodeID, h wire.Hello) (*node, error) {
	t.Helper()
	a, b := net.Pipe()
	go srv.Serve(context.Background(), b, peer)
	a.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() { a.Close() })
	a.Write(wire.AppendFrame(nil, wire.KindHello, 0, h.Append(nil)))
	r := bufio.NewReader(a)
	hdr, body, err := wire.ReadFrame(r, wire.MaxGreeting)
	if err != nil {
		return nil, err
	}
	if hdr.Kind == wire.KindRefused {
		no, _ := wire.ParseRefused(body)
		return nil, refusal(no.Reason)
	}
	return &node{t: t, conn: a, r: r}, nil
}

type refusal wire.Refusal

func (r refusal) Error() string { return wire.Refusal(r).String() }

// ask sends a request and gives the reply's error and body.
func (n *node) ask(op wire.Opcode, id uint64, uid uint32, body []byte) (unix.Errno, []byte) {
	n.t.Helper()
	n.seq++
	h := wire.InHeader{Len: uint32(wire.InHeaderSize + len(body)), Opcode: op, Unique: n.seq * 2, NodeID: id, UID: uid, GID: uid}
	msg := append(bytes.Clone(wire.Bytes(&h)), body...)
	var fh [wire.HeaderSize]byte
	wire.Header{Length: uint32(len(msg)), Kind: wire.KindRequest, Seq: n.seq}.Put(fh[:])
	n.conn.Write(append(fh[:], msg...))
	for {
		hdr, reply, err := wire.ReadFrame(n.r, wire.MaxBody)
		if err != nil {
			n.t.Fatal(err)
		}
		if hdr.Kind != wire.KindReply {
			continue
		}
		out, rest, err := wire.ParseReply(reply)
		if err != nil {
			n.t.Fatal(err)
		}
		return unix.Errno(-out.Error), rest
	}
}

// A node that was taken over speaks the protocol as it likes. It gets no
// further than the users of the capsules it holds.
func TestHostileNode(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: acts as other users")
	}
	srv, err := home.New(home.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	base := t.TempDir()
	os.Chmod(base, 0o755)
	os.Chmod(filepath.Dir(base), 0o755)
	dir := filepath.Join(base, "root")
	os.Mkdir(dir, 0o777)
	os.Chmod(dir, 0o777)
	os.WriteFile(filepath.Join(base, "outside"), []byte("secret"), 0o644)
	os.WriteFile(filepath.Join(dir, "shadow"), []byte("secret"), 0o600)
	unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
	unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666)
	os.Symlink("../outside", filepath.Join(dir, "link"))
	if err := srv.Add(home.Capsule{ID: "j", Root: dir, Node: 2, Epoch: 5, Users: []home.Cred{alice}}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		peer api.NodeID
		h    wire.Hello
		want wire.Refusal
	}{
		{"another node", 3, wire.Hello{Capsule: "j", Epoch: 5}, wire.RefuseUnknown},
		{"another capsule", 2, wire.Hello{Capsule: "k", Epoch: 5}, wire.RefuseUnknown},
		{"an old epoch", 2, wire.Hello{Capsule: "j", Epoch: 4}, wire.RefuseFenced},
		{"an epoch to come", 2, wire.Hello{Capsule: "j", Epoch: 6}, wire.RefuseUnknown},
	} {
		if _, err := greet(t, srv, tc.peer, tc.h); !errors.Is(err, refusal(tc.want)) {
			t.Errorf("%s: %v; want %v", tc.name, err, tc.want)
		}
	}
	n, err := greet(t, srv, 2, wire.Hello{Capsule: "j", Epoch: 5, Session: wire.SessionID{1}})
	if err != nil {
		t.Fatal(err)
	}
	name := func(s string) []byte { return append([]byte(s), 0) }
	lookup := func(s string) uint64 {
		e, b := n.ask(wire.OpLookup, wire.RootID, 1000, name(s))
		out, _, ok := wire.As[wire.EntryOut](b)
		if e != 0 || !ok {
			t.Fatalf("lookup %s: %v", s, e)
		}
		return out.NodeID
	}
	for _, bad := range []string{"..", ".", "", "a/b", "../outside", "/", "/etc/passwd"} {
		if e, _ := n.ask(wire.OpLookup, wire.RootID, 1000, name(bad)); e != unix.EINVAL {
			t.Errorf("lookup %q: %v; want EINVAL", bad, e)
		}
	}
	open := wire.Bytes(&wire.OpenIn{Flags: unix.O_RDWR})
	for _, tc := range []struct {
		what string
		op   wire.Opcode
		id   uint64
		uid  uint32
		body []byte
		want unix.Errno
	}{
		{"open another's file", wire.OpOpen, lookup("shadow"), 1000, open, unix.EACCES},
		{"open it as root", wire.OpOpen, lookup("shadow"), 0, open, unix.EACCES},
		{"open it as nobody", wire.OpOpen, lookup("shadow"), ^uint32(0), open, unix.EACCES},
		{"open it as another user", wire.OpOpen, lookup("shadow"), 1001, open, unix.EPERM},
		{"open a device", wire.OpOpen, lookup("null"), 1000, open, unix.EACCES},
		{"open a fifo", wire.OpOpen, lookup("fifo"), 1000, open, unix.EACCES},
		{"open a link", wire.OpOpen, lookup("link"), 1000, open, unix.EACCES},
		{"chown to itself", wire.OpSetattr, lookup("shadow"), 0, wire.Bytes(&wire.SetattrIn{Valid: wire.FattrUID, UID: 1000}), unix.EPERM},
		{"make a device", wire.OpMknod, wire.RootID, 0, append(wire.Bytes(&wire.MknodIn{Mode: unix.S_IFBLK | 0o666, Rdev: 0x800}), "sda\x00"...), unix.EPERM},
		{"an inode it was not told of", wire.OpGetattr, 4711, 1000, wire.Bytes(&wire.GetattrIn{}), unix.ESTALE},
		{"a file it has not opened", wire.OpRead, 1, 1000, wire.Bytes(&wire.ReadIn{FH: 4711, Size: 10}), unix.EBADF},
		{"a short body", wire.OpOpen, wire.RootID, 1000, []byte{1, 2}, unix.EINVAL},
		{"an unknown operation", 4095, wire.RootID, 1000, nil, unix.ENOSYS},
		{"create outside", wire.OpCreate, wire.RootID, 1000, append(wire.Bytes(&wire.CreateIn{Flags: unix.O_RDWR}), "../x\x00"...), unix.EINVAL},
		{"write more than it sends", wire.OpWrite, 1, 1000, wire.Bytes(&wire.WriteIn{Size: 1 << 20}), unix.EINVAL},
	} {
		if e, _ := n.ask(tc.op, tc.id, tc.uid, bytes.Clone(tc.body)); e != tc.want {
			t.Errorf("%s: %v; want %v", tc.what, e, tc.want)
		}
	}
	// File capabilities would make the job's program root at home.
	id := lookup("fifo")
	mk := wire.Bytes(&wire.CreateIn{Flags: unix.O_RDWR, Mode: 0o755})
	if e, b := n.ask(wire.OpCreate, wire.RootID, 1000, append(mk, "prog\x00"...)); e != 0 {
		t.Errorf("create: %v", e)
	} else if out, _, ok := wire.As[wire.EntryOut](b); ok {
		id = out.NodeID
	}
	cap := []byte{1, 0, 0, 2, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	set := append(wire.Bytes(&wire.SetxattrIn{Size: uint32(len(cap))}), "security.capability\x00"...)
	for _, uid := range []uint32{1000, 0} {
		if e, _ := n.ask(wire.OpSetxattr, id, uid, append(bytes.Clone(set), cap...)); e != unix.EPERM {
			t.Errorf("set a file's capabilities as %d: %v; want EPERM", uid, e)
		}
	}
}
