package shim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"google.golang.org/protobuf/proto"

	"mosimg/agent/capsule/control"
)

// Magic numbers of an image with one process or thread (criu/include/magic.h).
const (
	imgCommonMagic = 0x54564319
	coreMagic      = 0x55053847
	imageHead      = 12 // two magic numbers and the size of the one entry
)

// checkCreds refuses images that would make processes with other rights than
// the job's owner has. They come from the node where the job was, and CRIU,
// which is root here, does what they say.
func checkCreds(images *os.Root, owner control.Owner) error {
	names, err := fs.Glob(images.FS(), "core-*.img")
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return errors.New("the images have no process")
	}
	for _, name := range names {
		data, err := images.ReadFile(name)
		if err != nil {
			return err
		}
		if err := checkCore(data, owner); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// taskDead is TASK_DEAD of CRIU's criu/include/pstree.h: ended, and not waited
// for yet.
const taskDead = 2

// checkCore checks the image of one thread.
func checkCore(data []byte, owner control.Owner) error {
	if len(data) < imageHead || binary.LittleEndian.Uint32(data) != imgCommonMagic || binary.LittleEndian.Uint32(data[4:]) != coreMagic {
		return errors.New("not an image of a process")
	}
	body := data[imageHead:]
	if binary.LittleEndian.Uint32(data[8:]) != uint32(len(body)) {
		return errors.New("an image of another length than it says")
	}
	var e core.CoreEntry
	if err := proto.Unmarshal(body, &e); err != nil {
		return err
	}
	c := e.GetThreadCore().GetCreds()
	if c == nil {
		// A zombie has none and gets none: CRIU makes a process that ends at once.
		// What has a thread, dead or not, is checked as all are.
		if e.GetThreadCore() == nil && e.GetTc().GetTaskState() == taskDead {
			return nil
		}
		return errors.New("no credentials")
	}
	for _, uid := range []uint32{c.GetUid(), c.GetEuid(), c.GetSuid(), c.GetFsuid()} {
		if uid != owner.UID {
			return fmt.Errorf("a process with the rights of user %d; the job's is %d", uid, owner.UID)
		}
	}
	groups := append(slices.Clone(owner.Groups), owner.GID)
	for _, gid := range append([]uint32{c.GetGid(), c.GetEgid(), c.GetSgid(), c.GetFsgid()}, c.GetGroups()...) {
		if !slices.Contains(groups, gid) {
			return fmt.Errorf("a process of group %d; the job's user is not in it", gid)
		}
	}
	if owner.UID == 0 {
		return nil // what it may do is bounded as that of every job
	}
	for _, caps := range [][]uint32{c.GetCapInh(), c.GetCapPrm(), c.GetCapEff()} {
		for _, word := range caps {
			if word != 0 {
				return errors.New("a process with capabilities")
			}
		}
	}
	// Every job is behind our filter; one that is not would be behind none here.
	// CRIU says it of a process only, and puts its other threads behind the same one.
	mode := e.GetThreadCore().SeccompMode
	if thread := e.GetTc() == nil; (mode == nil && !thread) || (mode != nil && *mode != core.SeccompMode_filter) {
		return errors.New("a process without the filter of system calls")
	}
	return nil
}
