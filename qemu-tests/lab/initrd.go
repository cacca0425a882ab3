package lab

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"github.com/u-root/mkuimage/cpio"

	"mosimg/internal/imageset"
)

// Names of files in a lab's folder.
const (
	headInitrd   = "head.initrd"
	stateDisk    = "state.img"
	captureFile  = "lab.pcap"
	commandsFile = "commands.sh"
	logFile      = "lab.log"
	stateFile    = "lab.json"
	lockFile     = "lab.lock"
	socketFolder = "s"
)

// clusterConfig is where a head reads its configuration.
const clusterConfig = "etc/mosimg/cluster.yaml"

// writeHeadInitrd joins what the head boots: the initramfs, the head archive
// and the configuration. The kernel unpacks one after the other; between them
// it skips zeros, and an archive that is not compressed must begin at a
// multiple of 4 (linux/init/initramfs.c).
func writeHeadInitrd(name string, set *imageset.Set, cluster []byte) (err error) {
	out, err := os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if e := out.Close(); err == nil {
			err = e
		}
	}()
	var parts []io.Reader
	for _, part := range []string{imageset.Initramfs, imageset.HeadArchive} {
		f, err := os.Open(set.Path(part))
		if err != nil {
			return err
		}
		defer f.Close()
		parts = append(parts, f)
	}
	if cluster != nil {
		b, err := configArchive(cluster)
		if err != nil {
			return err
		}
		parts = append(parts, bytes.NewReader(b))
	}
	for _, p := range parts {
		n, err := io.Copy(out, p)
		if err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if pad := -n & 3; pad != 0 {
			if _, err := out.Write(make([]byte, pad)); err != nil {
				return fmt.Errorf("write %s: %w", name, err)
			}
		}
	}
	return nil
}

// configArchive is a small cpio with the head's configuration.
func configArchive(cluster []byte) ([]byte, error) {
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	for _, r := range []cpio.Record{
		cpio.Directory("etc", 0o755),
		cpio.Directory("etc/mosimg", 0o755),
		cpio.StaticFile(clusterConfig, string(cluster), 0o644),
	} {
		if err := w.WriteRecord(r); err != nil {
			return nil, err
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
