package mounts

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// syncTime bounds the writing back of what a job has changed in mapped files, over
// a slow link.
const syncTime = 2 * time.Minute

// Sync implements migrate.Roots.
func (r *Roots) Sync(ctx context.Context, home api.NodeID, job migrate.JobID, epoch uint64) error {
	if home == r.conf.Self {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, syncTime)
	defer cancel()
	m, err := r.mount(job, epoch)
	if err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() { written <- m.writeBack(ctx) }() // it may wait in the kernel for a link that is gone
	select {
	case err = <-written:
	case <-ctx.Done():
		err = fmt.Errorf("the home has not taken them: %w", context.Cause(ctx))
	}
	if err == nil {
		_, err = m.ask(ctx, question{Op: opDrain})
	}
	if err != nil {
		return fault.New(fault.Unavailable, "write back home files of", "job "+string(job), err, "")
	}
	return nil
}

// writeBack makes the kernel write all pages that were changed, and waits until the home
// has them. Why this is not just syncfs(2) is told in package forward.
func (m mount) writeBack(ctx context.Context) error {
	runtime.LockOSThread() // the mount's process knows us by our thread
	defer runtime.UnlockOSThread()
	root, err := unix.Open(m.path(mountName), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return m.over(&os.PathError{Op: "open", Path: m.path(mountName), Err: err})
	}
	defer unix.Close(root)
	var st unix.Statfs_t
	if err := unix.Fstatfs(root, &st); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	if st.Type != unix.FUSE_SUPER_MAGIC {
		return m.over(fmt.Errorf("%s is not mounted", m.path(mountName))) // to sync another file system would sync nothing
	}
	// It begins with all of them; each is waited for below.
	if err := unix.Syncfs(root); err != nil {
		return os.NewSyscallError("syncfs", err)
	}
	for {
		missed, err := m.syncWriters(ctx, root)
		if err != nil || !missed {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		time.Sleep(time.Millisecond)
	}
}

// over is the cause of an error, if the mount's process has left word of it.
func (m mount) over(err error) error {
	if why, rerr := os.ReadFile(m.path(endName)); rerr == nil {
		return overError(why)
	}
	return err
}

// syncWriters syncs all files that are open for writing. missed says that one has
// been closed meanwhile, so that the list has to be made again.
func (m mount) syncWriters(ctx context.Context, root int) (missed bool, err error) {
	a, c, err := m.askKept(ctx, question{Op: opWriters, Thread: uint32(unix.Gettid())})
	if c != nil {
		defer c.Close()
	}
	if err != nil {
		return false, err
	}
	for _, inode := range a.Inodes {
		switch err := syncInode(root, inode); {
		case errors.Is(err, unix.ESTALE):
			missed = true
		case err != nil:
			return false, err
		}
	}
	return missed, nil
}

// syncInode syncs an inode of a FUSE mount, by the file handle that its kernel makes
// of it (fuse_encode_fh in fs/fuse/inode.c): id and generation, which with us is 0.
// ESTALE says that the kernel has it no more.
func syncInode(root int, id uint64) error {
	const inodeAndGeneration = 0x81
	b := binary.NativeEndian.AppendUint32(nil, uint32(id>>32))
	b = binary.NativeEndian.AppendUint32(b, uint32(id))
	b = binary.NativeEndian.AppendUint32(b, 0)
	fd, err := unix.OpenByHandleAt(root, unix.NewFileHandle(inodeAndGeneration, b), unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("open_by_handle_at", err)
	}
	defer unix.Close(fd)
	if err := unix.Fsync(fd); err != nil {
		name, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)) // without a name it is an error too
		_, name, _ = strings.Cut(name, "/"+mountName+"/")
		return &os.PathError{Op: "sync", Path: "/" + name, Err: err}
	}
	return nil
}
