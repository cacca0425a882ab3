package migrate

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"mosimg/internal/atomicfile"
)

// Journal keeps one JSON file for each key in a folder. A Put is on the disk when
// it returns, if the folder is on one: on a diskless node it is in memory, and
// survives the agent but not the machine.
type Journal[T any] struct{ dir string }

// OpenJournal makes the folder, or removes from it what an agent has left that was
// killed while it wrote. Only one process may have it open.
func OpenJournal[T any](dir string) (*Journal[T], error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	unfinished, err := filepath.Glob(filepath.Join(dir, ".*"+journalSuffix+".*"))
	if err != nil {
		return nil, err
	}
	for _, name := range unfinished {
		if err := os.Remove(name); err != nil {
			return nil, err
		}
	}
	return &Journal[T]{dir: dir}, nil
}

const journalSuffix = ".json"

func (j *Journal[T]) path(key string) (string, error) {
	if key == "" || strings.ContainsAny(key, "/\x00") || strings.HasPrefix(key, ".") {
		return "", fmt.Errorf("journal: %q is no key", key)
	}
	return filepath.Join(j.dir, key+journalSuffix), nil
}

// Put writes a value, in place of an older one.
func (j *Journal[T]) Put(key string, v T) error {
	path, err := j.path(key)
	if err != nil {
		return err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, data, 0o600)
}

// Delete removes a value; one that is not there is no error.
func (j *Journal[T]) Delete(key string) error {
	path, err := j.path(key)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return atomicfile.SyncDir(j.dir)
}

// All reads every value. A file that cannot be read is an error: to forget a
// job is to lose it.
func (j *Journal[T]) All() (map[string]T, error) {
	names, err := filepath.Glob(filepath.Join(j.dir, "*"+journalSuffix))
	if err != nil {
		return nil, err
	}
	all := make(map[string]T)
	for _, name := range names {
		key := strings.TrimSuffix(filepath.Base(name), journalSuffix)
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		var v T
		if err := json.Unmarshal(data, &v); err != nil {
			return nil, fmt.Errorf("journal: %s: %w", name, err)
		}
		all[key] = v
	}
	return all, nil
}
