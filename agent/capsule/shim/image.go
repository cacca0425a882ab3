package shim

import (
	"encoding/json"
	"fmt"
	"os"

	"mosimg/agent/capsule/control"
	"mosimg/agent/capsule/leader"
	"mosimg/internal/fault"
)

// Files that the shim puts beside CRIU's in an images folder.
const (
	imageName   = "capsule.json"
	dumpLog     = "dump.log"
	restoreLog  = "restore.log"
	imageFormat = 1
)

// trees are the file systems of a capsule that live in memory. CRIU does not
// carry them, since it does not look at mounts here; each goes into a tar
// archive in the images folder.
var trees = []struct{ dir, archive string }{
	{"/dev/shm", "shm.tar"},
	{"/run", "run.tar"},
}

// image is what a dumped job is beside CRIU's images and the trees.
type image struct {
	Format  int // imageFormat; another one is refused
	Leader  int
	Program int
	Pids    []int     // every process of the job
	Tids    []int     // every thread
	Pipes   [3]uint64 // inode numbers of stdin, stdout and stderr on the old node
	Streams streamState
	// CPUMicros is how long its processes have run, on all nodes so far.
	CPUMicros int64
	// LastSignal is the highest ID of a signal that it was sent.
	LastSignal uint64 `json:"SignalsTo,omitempty"`
	// LeaderImage is the program of the leader that the job was started with.
	LeaderImage []byte
}

func (s *shim) saveImage(dir *os.File, im image) error {
	im.Format, im.LeaderImage = imageFormat, leader.Image()
	if s.leaderImage != nil {
		im.LeaderImage = s.leaderImage
	}
	root, err := openRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	data, err := json.Marshal(im)
	if err != nil {
		return err
	}
	if err := root.WriteFile(imageName, data, 0o600); err != nil {
		return err
	}
	for _, t := range trees {
		if err := saveTree(root, t.archive, t.dir); err != nil {
			return fmt.Errorf("save %s: %w", t.dir, err)
		}
	}
	return nil
}

func (s *shim) loadImage(dir *os.File, owner control.Owner) (im image, err error) {
	root, err := openRoot(dir)
	if err != nil {
		return im, err
	}
	defer root.Close()
	data, err := root.ReadFile(imageName)
	if err != nil {
		return im, err
	}
	if err := json.Unmarshal(data, &im); err != nil {
		return im, fmt.Errorf("read %s: %w", imageName, err)
	}
	if im.Format != imageFormat {
		return im, fault.New(fault.Refused, "restore", "job", fmt.Sprintf("its image has format %d, this node knows %d", im.Format, imageFormat), "run the same mosimg on both nodes")
	}
	if err := checkCreds(root, owner); err != nil {
		return im, err
	}
	s.leaderImage = im.LeaderImage
	if err := putLeader(im.LeaderImage); err != nil {
		return im, err
	}
	for _, t := range trees {
		if err := loadTree(root, t.archive, t.dir); err != nil {
			return im, fmt.Errorf("restore %s: %w", t.dir, err)
		}
	}
	return im, nil
}

// openRoot opens a folder that we have only a descriptor of.
func openRoot(dir *os.File) (*os.Root, error) {
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
}
