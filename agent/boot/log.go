package boot

import (
	"bufio"
	"errors"
	"io"
	"os"
	"unicode"
)

// maxLog bounds a service's log file; one older file of this size is kept.
// They lie in memory on a diskless node.
const maxLog = 256 << 10

// logTime is how a line's time is written. The clock of a diskless machine may
// be wrong until the head has told it the time.
const logTime = "2006-01-02T15:04:05.000Z07:00"

// maxLine bounds a line of a service's output; longer ones are broken.
const maxLine = 1000

// logFile is a bounded log.
type logFile struct {
	path string
	f    *os.File
	size int64
}

func openLog(path string) (*logFile, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &logFile{path: path, f: f, size: fi.Size()}, nil
}

func (l *logFile) Write(p []byte) (int, error) {
	if l.f == nil {
		return 0, os.ErrClosed
	}
	if l.size+int64(len(p)) > maxLog {
		l.f.Close()
		// Should this fail, the old half is lost and not the new lines.
		_ = os.Rename(l.path, l.path+".1")
		f, err := os.OpenFile(l.path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
		if err != nil {
			l.f = nil
			return 0, err
		}
		l.f, l.size = f, 0
	}
	n, err := l.f.Write(p)
	l.size += int64(n)
	return n, err
}

func (l *logFile) Close() error {
	if l.f == nil {
		return nil
	}
	return l.f.Close()
}

// lines calls each for each line of r, without its end. Control characters
// are blanked: a service's output must not play tricks on the console.
func lines(r io.Reader, each func([]byte)) {
	br := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := br.ReadSlice('\n')
		if len(line) > 0 && line[len(line)-1] == '\n' {
			line = line[:len(line)-1]
		}
		clean := make([]byte, len(line), len(line)+1)
		for i, b := range line {
			if b < 0x80 && unicode.IsControl(rune(b)) {
				b = ' '
			}
			clean[i] = b
		}
		if len(clean) > 0 || err == nil {
			each(clean)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}
