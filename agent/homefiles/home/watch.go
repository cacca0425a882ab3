package home

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
)

// watcher tells sessions what other processes at home change, by fanotify on
// whole file systems. A nil watcher is one that could not be had.
type watcher struct {
	srv *Server
	f   *os.File
	pid int32
}

// The events: of files, and of names in directories.
const (
	inodeEvents = unix.FAN_MODIFY | unix.FAN_ATTRIB
	nameEvents  = unix.FAN_CREATE | unix.FAN_DELETE | unix.FAN_MOVED_FROM | unix.FAN_MOVED_TO
)

func newWatcher(s *Server) (*watcher, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|
		unix.FAN_REPORT_FID|unix.FAN_REPORT_DFID_NAME|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("fanotify: %w", err)
	}
	w := &watcher{srv: s, f: os.NewFile(uintptr(fd), "fanotify"), pid: int32(os.Getpid())}
	go w.run()
	return w, nil
}

// alive tells whether nodes hear of changes.
func (w *watcher) alive() bool { return w != nil }

// add watches the file system that fd is on. One that cannot be watched
// (some have no identity) is seen by time only.
func (w *watcher) add(fd int) {
	err := unix.FanotifyMark(int(w.f.Fd()), unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, inodeEvents|nameEvents|unix.FAN_ONDIR, fd, "")
	if err != nil {
		w.srv.log.Info("home files: a file system cannot be watched", "cause", err)
	}
}

func (w *watcher) close() { w.f.Close() }

// gatherTime is how long changes are let gather before they are looked at. The
// kernel makes one event of what happens to the same file meanwhile, and a program
// that writes line by line, or a guest that makes files, does not wake us for each.
const gatherTime = 2 * time.Millisecond

func (w *watcher) run() {
	buf := make([]byte, 64<<10)
	for ; ; time.Sleep(gatherTime) {
		n, err := w.f.Read(buf)
		if err != nil {
			return // closed
		}
		for b := buf[:n]; len(b) > 0; {
			ev, rest, err := parseEvent(b)
			if err != nil {
				w.srv.log.Warn("home files: fanotify", "cause", err)
				break
			}
			b = rest
			w.tell(ev)
		}
	}
}

// event is a change: of what handle names (by the handle part of an inodeKey),
// or of name in dir.
type event struct {
	mask     uint64
	pid      int32
	handle   string // "" if the event does not say
	dir      string
	name     string
	overflow bool
}

// Sizes and types of include/uapi/linux/fanotify.h.
const (
	eventSize    = 24
	infoHeader   = 4
	infoFSID     = 8
	infoFID      = 1
	infoDFIDName = 2
	infoDFID     = 3
)

// parseEvent cuts the first event off what fanotify gave.
func parseEvent(b []byte) (event, []byte, error) {
	if len(b) < eventSize {
		return event{}, nil, fmt.Errorf("event of %d bytes", len(b))
	}
	size := int(binary.NativeEndian.Uint32(b))
	if size < eventSize || size > len(b) {
		return event{}, nil, fmt.Errorf("event says it has %d bytes of %d", size, len(b))
	}
	ev := event{mask: binary.NativeEndian.Uint64(b[8:]), pid: int32(binary.NativeEndian.Uint32(b[20:]))}
	ev.overflow = ev.mask&unix.FAN_Q_OVERFLOW != 0
	meta := int(binary.NativeEndian.Uint16(b[6:]))
	if meta < eventSize || meta > size {
		return event{}, nil, fmt.Errorf("event with metadata of %d bytes", meta)
	}
	for info := b[meta:size]; len(info) >= infoHeader; {
		n := int(binary.NativeEndian.Uint16(info[2:]))
		if n < infoHeader || n > len(info) {
			return event{}, nil, fmt.Errorf("event with a part of %d bytes", n)
		}
		part := info[infoHeader:n]
		typ := info[0]
		info = info[n:]
		if len(part) < infoFSID+8 {
			continue
		}
		part = part[infoFSID:]
		hlen := int(binary.NativeEndian.Uint32(part))
		if hlen < 0 || hlen > len(part)-8 {
			return event{}, nil, fmt.Errorf("event with a handle of %d bytes", hlen)
		}
		handle := string(part[4 : 8+hlen]) // type and bytes, as in inodeKey
		switch typ {
		case infoFID:
			ev.handle = handle
		case infoDFID, infoDFIDName:
			ev.dir = handle
			if typ == infoDFIDName {
				ev.name, _, _ = wire.Name(part[8+hlen:])
			}
		}
	}
	return ev, b[size:], nil
}

// tell passes a change on. What this process did itself is known where it was
// asked for; other capsules see it by time.
func (w *watcher) tell(ev event) {
	if ev.pid == w.pid {
		return
	}
	for _, ss := range w.srv.allSessions() {
		for _, msg := range ss.affected(ev) {
			ss.notify(msg)
		}
	}
}

func (s *Server) allSessions() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*session
	for _, c := range s.capsules {
		for _, ss := range c.sessions {
			all = append(all, ss)
		}
	}
	return all
}

// affected is what this session's node must forget after ev. Handles are
// looked up in each mount: a file system may be mounted more than once, and
// the event does not say where.
func (ss *session) affected(ev event) [][]byte {
	mounts := ss.srv.mountIDs()
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var msgs [][]byte
	if ev.overflow {
		for id := range ss.inodes {
			msgs = append(msgs, wire.NotifyInode(id))
		}
		return msgs
	}
	for _, m := range mounts {
		if ev.handle != "" {
			if in := ss.byKey[inodeKey{mount: m, handle: ev.handle}]; in != nil {
				msgs = append(msgs, wire.NotifyInode(in.id))
			}
		}
		if ev.dir != "" {
			if in := ss.byKey[inodeKey{mount: m, handle: ev.dir}]; in != nil {
				if ev.mask&nameEvents != 0 && ev.name != "" && ev.name != "." {
					msgs = append(msgs, wire.NotifyEntry(in.id, ev.name))
				}
				if ev.mask&nameEvents != 0 || ev.name == "." {
					msgs = append(msgs, wire.NotifyInode(in.id))
				}
			}
		}
	}
	return slices.Clip(msgs)
}

func (s *Server) mountIDs() []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := make([]int, 0, len(s.mounts))
	for id := range s.mounts {
		ids = append(ids, id)
	}
	return ids
}
