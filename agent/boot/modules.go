package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/internal/modlist"
)

// loader loads kernel modules from the image's list, each once.
type loader struct {
	list *modlist.List
	log  *slog.Logger
	load func(modlist.Module) error
	done map[string]bool // by module name: loaded, or failed and told
}

func newLoader(path string, log *slog.Logger) (*loader, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := modlist.Parse(data)
	if err != nil {
		return nil, err
	}
	return &loader{list: list, log: log, load: insmod, done: make(map[string]bool)}, nil
}

// run loads a plan and returns how many modules were new. A module that
// fails is reported and left out: one bad driver must not stop a boot.
func (l *loader) run(plan []modlist.Module) (fresh int) {
	for _, m := range plan {
		if l.done[m.Name] {
			continue
		}
		l.done[m.Name] = true
		if err := l.load(m); err != nil {
			l.log.Warn("kernel module not loaded", "module", m.Name, "why", err)
			continue
		}
		fresh++
	}
	return fresh
}

// hardware loads the drivers of all devices. A bus driver shows new devices,
// so it is repeated until a round loads nothing.
func (l *loader) hardware(sys string) (fresh int) {
	for {
		n := l.run(l.list.ForHardware(modaliases(sys)))
		fresh += n
		if n == 0 {
			return fresh
		}
	}
}

// modaliases are the names by which all devices under sys ask for a driver.
func modaliases(sys string) []string {
	seen := make(map[string]bool)
	var all []string
	_ = filepath.WalkDir(sys, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() != "modalias" {
			return nil // a device may go while we walk
		}
		data, err := os.ReadFile(path)
		if a := strings.TrimSpace(string(data)); err == nil && a != "" && !seen[a] {
			seen[a] = true
			all = append(all, a)
		}
		return nil
	})
	return all
}

func insmod(m modlist.Module) error {
	f, err := os.Open(m.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), m.Params, 0)
	switch {
	case err == nil, errors.Is(err, unix.EEXIST): // EEXIST: loaded, or built in
		return nil
	case errors.Is(err, unix.ENOEXEC):
		return fmt.Errorf("%s: %w (built for another kernel than %s?)", m.Path, err, kernelRelease())
	}
	return fmt.Errorf("%s: %w", m.Path, err)
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "this one"
	}
	return unix.ByteSliceToString(u.Release[:])
}
