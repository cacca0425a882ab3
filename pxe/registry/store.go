// Package registry is the head's memory: cluster authority, node records,
// address leases, boot nonces, gossip keys and void certificates, in one
// bbolt file. Whatever a machine was told is on disk before it was told: a
// commit is fsynced, so a power cut loses nothing that anyone acts on.
//
// The package stores and keeps invariants (lasting numbers, the generation of
// the cluster view); it takes no decisions. Those are in pxe/enrol.
package registry

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
)

// FileName is the store's file in the state folder.
const FileName = "head.db"

// Format is the version of the stored records; another one is refused.
const Format = "1"

// Options for Open. The zero value is usable.
type Options struct {
	// Cluster names a new cluster; an existing one is renamed to it. Empty
	// keeps the stored name ("mosimg" for a new one).
	Cluster string
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log gets a line for what is mended or made at start; nil is silent.
	Log *slog.Logger
}

// Store is the open registry. Its methods may be called concurrently.
type Store struct {
	db  *bolt.DB
	dir string
	now func() time.Time

	ca      *identity.CA
	headKey identity.Key

	// mu guards changed.
	mu      sync.Mutex
	changed chan struct{}
}

var (
	bucketMeta    = []byte("meta")
	bucketNodes   = []byte("nodes")   // MAC -> Node
	bucketIDs     = []byte("ids")     // number -> MAC, for the numbers in nodes
	bucketLeases  = []byte("leases")  // MAC -> Lease
	bucketNonces  = []byte("nonces")  // value -> Nonce
	bucketRevoked = []byte("revoked") // serial -> Revoked
	buckets       = [][]byte{bucketMeta, bucketNodes, bucketIDs, bucketLeases, bucketNonces, bucketRevoked}
)

// Open opens the registry in dir and makes it, with the cluster's authority,
// when there is none. Only one head can have it open.
func Open(dir string, opt Options) (*Store, error) {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	fail := func(cause any, hint string) error {
		return fault.New(fault.Environment, "open state folder", dir, cause, hint)
	}
	// It holds the private key of the cluster's authority: root's only.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fail(err, "name a folder that can be written with --state")
	}
	name := filepath.Join(dir, FileName)
	if err := create(name); err != nil {
		return nil, fail(err, "name a folder that can be written with --state")
	}
	db, err := openDB(name)
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fail("another head has it open"+lockHolder(name), "end that one first, or name another folder with --state")
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS), errors.Is(err, syscall.ENOSPC):
		return nil, fail(err, "name a folder that can be written with --state")
	case err != nil:
		return nil, fail(fmt.Errorf("%s is damaged: %w", FileName, err), "put back a copy of it, or move it away: the cluster is then new and every machine must be approved again")
	}
	s := &Store{db: db, dir: dir, now: opt.Now, changed: make(chan struct{})}
	if err := s.load(opt); err != nil {
		db.Close()
		return nil, fail(err, "")
	}
	return s, nil
}

// create makes an empty store unless there is one. It gets its name only when
// it is whole: a power cut or a full disk on the first day must not leave
// something that looks like a damaged registry.
func create(name string) error {
	if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp := fmt.Sprintf("%s.%d", name, os.Getpid())
	defer os.Remove(tmp)
	db, err := bolt.Open(tmp, 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		return err
	}
	if err := db.Close(); err != nil {
		return err
	}
	// Not a rename: another head may have made one meanwhile.
	if err := os.Link(tmp, name); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(name))
}

// openDB opens and checks the file. A file that was cut short makes bbolt
// read beyond its end, which would kill the process: such faults are turned
// into panics and those into errors.
func openDB(name string) (db *bolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			// The half-open DB is abandoned: closing it could fault again.
			db, err = nil, fmt.Errorf("unreadable: %v", r)
		}
	}()
	db, err = bolt.Open(name, 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		return nil, err
	}
	err = db.View(func(tx *bolt.Tx) error {
		for err := range tx.Check() {
			return err
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// lockHolder names the process that holds the lock on a file, from
// /proc/locks, or is "" when the kernel does not say.
func lockHolder(name string) string {
	st, err := os.Stat(name)
	if err != nil {
		return ""
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return ""
	}
	defer f.Close()
	inode := ":" + strconv.FormatUint(st.Sys().(*syscall.Stat_t).Ino, 10)
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// "1: FLOCK  ADVISORY  WRITE 1234 08:01:12345 0 EOF"
		w := strings.Fields(sc.Text())
		if len(w) >= 6 && w[1] == "FLOCK" && strings.HasSuffix(w[5], inode) && w[4] != "0" {
			return ", process " + w[4]
		}
	}
	return ""
}

// Close writes nothing: everything is on disk already.
func (s *Store) Close() error { return s.db.Close() }

// CA is the cluster's authority.
func (s *Store) CA() *identity.CA { return s.ca }

// HeadKey is the key of the head's API server.
func (s *Store) HeadKey() identity.Key { return s.headKey }

// Changed is closed at the next commit that changed a node, the gossip keys,
// the void certificates or the adoption window. Take it before reading, wait
// on it after.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// errClean ends a transaction that wrote nothing: it costs no fsync.
var errClean = errors.New("nothing was written")

// Update runs f in one transaction: all of it is on disk when Update returns
// nil, none of it otherwise.
func (s *Store) Update(f func(*Tx) error) error {
	var notify bool
	err := s.db.Update(func(btx *bolt.Tx) error {
		tx := &Tx{tx: btx, now: s.now()}
		if err := f(tx); err != nil {
			return err
		}
		if tx.err == nil && !tx.dirty {
			return errClean
		}
		notify = tx.notify
		return tx.finish()
	})
	if errors.Is(err, errClean) {
		return nil
	}
	if err == nil && notify {
		s.mu.Lock()
		close(s.changed)
		s.changed = make(chan struct{})
		s.mu.Unlock()
	}
	return stateFault(err)
}

// View runs f on one consistent state.
func (s *Store) View(f func(*Tx) error) error {
	return stateFault(s.db.View(func(btx *bolt.Tx) error {
		tx := &Tx{tx: btx, now: s.now()}
		if err := f(tx); err != nil {
			return err
		}
		return tx.err
	}))
}

// stateFault gives faults of the disk a kind; those of the callback pass.
func stateFault(err error) error {
	var e *fault.Error
	if err == nil || errors.As(err, &e) {
		return err
	}
	return fault.New(fault.Environment, "write state", "", err, "is the disk of the state folder full?")
}

// SaveLease stores a lease. Many machines boot at once: concurrent calls
// share one fsync.
func (s *Store) SaveLease(l Lease) error {
	return stateFault(s.db.Batch(func(btx *bolt.Tx) error {
		tx := &Tx{tx: btx, now: s.now()}
		tx.put(bucketLeases, l.MAC, l)
		return tx.err
	}))
}
