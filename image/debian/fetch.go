package debian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"mosimg/image/cache"
	"mosimg/internal/fault"
)

// Fetcher gets files from mirrors. It is safe for concurrent use.
type Fetcher struct {
	cache    *cache.Cache
	client   *http.Client
	log      *slog.Logger
	progress func(name string, done, total int64)
	pause    time.Duration // before the second try
}

// NewFetcher makes a Fetcher that keeps what it gets in c. proxy answers which
// proxy to use for a request; nil means the environment's (http_proxy and so
// on). A nil log is silent.
func NewFetcher(c *cache.Cache, proxy func(*http.Request) (*url.URL, error), log *slog.Logger) *Fetcher {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = connectTime
	// A compressed file must arrive as it is, or no hash would fit.
	t.DisableCompression = true
	if proxy != nil {
		t.Proxy = proxy
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Fetcher{cache: c, client: &http.Client{Transport: t}, log: log, pause: fetchPause}
}

// WithProgress is the same Fetcher with somebody who hears how far each
// download is, at most once a second.
func (f *Fetcher) WithProgress(tell func(name string, done, total int64)) *Fetcher {
	c := *f
	c.progress = tell
	return &c
}

const (
	fetchTries  = 4
	smallTries  = 2                      // for an index: there are other mirrors, or the one in the cache
	fetchPause  = 500 * time.Millisecond // before the second try; doubled each time
	connectTime = 20 * time.Second       // to the first byte of the answer
	idleTime    = 30 * time.Second       // without a byte: the transfer hangs
)

// errGone is an answer that trying again does not change.
type errGone struct{ status string }

func (e errGone) Error() string { return e.status }

// notThere says whether err is a plain "no such file" from a mirror, as
// against a mirror that cannot be reached.
func notThere(err error) bool {
	var gone errGone
	return errors.As(err, &gone) || errors.Is(err, fs.ErrNotExist)
}

// Small fetches a file of at most limit bytes. When etag or since is set and
// the file did not change, it returns (nil, nil, nil). The header is nil for
// file URLs.
func (f *Fetcher) Small(ctx context.Context, rawURL string, limit int64, since http.Header) ([]byte, http.Header, error) {
	var data []byte
	var header http.Header
	err := f.retry(ctx, rawURL, smallTries, func(ctx context.Context) error {
		body, h, err := f.open(ctx, rawURL, 0, since)
		if err != nil || body == nil {
			data = nil
			return err
		}
		defer body.Close()
		data, err = io.ReadAll(io.LimitReader(body, limit+1))
		if err == nil && int64(len(data)) > limit {
			err = errGone{fmt.Sprintf("the file has more than %d bytes", limit)}
		}
		header = h
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return data, header, nil
}

// Blob brings the file with this size and SHA-256 into the cache, from the
// first URL that has it, and returns its path. An interrupted download is
// taken up where it ended, by this or another process.
func (f *Fetcher) Blob(ctx context.Context, name string, urls []string, size int64, sum string) (string, error) {
	final := f.cache.Blob(sum)
	if err := checkFile(final, size, sum); err == nil {
		cache.Use(final)
		return final, nil
	}
	part, err := cache.LockFile(ctx, final+".part")
	if err != nil {
		return "", fetchFault(name, err)
	}
	defer part.Close()
	if err := checkFile(final, size, sum); err == nil { // somebody else did it while we waited
		os.Remove(part.Name())
		return final, nil
	}
	os.Remove(final) // damaged on disk
	for i, u := range urls {
		err = f.download(ctx, name, u, part, size, sum)
		if err == nil || ctx.Err() != nil || !notThere(err) || i == len(urls)-1 {
			break
		}
	}
	if err != nil {
		if st, serr := part.Stat(); serr == nil && st.Size() == 0 {
			os.Remove(part.Name())
		}
		return "", fetchFault(name, err)
	}
	if err := os.Rename(part.Name(), final); err != nil {
		return "", fetchFault(name, err)
	}
	return final, nil
}

func fetchFault(name string, err error) error {
	var known *fault.Error
	switch {
	case errors.As(err, &known), errors.Is(err, context.Canceled):
		return err
	case notThere(err):
		return fault.New(fault.NotFound, "fetch", name, err, "the mirror is incomplete or in the middle of an update; try again later or another --mirror")
	case isLocal(err):
		return fault.New(fault.Environment, "fetch", name, err, "")
	}
	return fault.New(fault.Unavailable, "fetch", name, err, "check the network, or try another --mirror")
}

// isLocal says whether err came from this machine's disk.
func isLocal(err error) bool {
	var p *fs.PathError
	return errors.As(err, &p)
}

// download completes part from rawURL and verifies it. Bytes from an earlier
// try are kept; when the whole then has a wrong hash, they are doubted first.
func (f *Fetcher) download(ctx context.Context, name, rawURL string, part *os.File, size int64, sum string) error {
	resumed := false
	for {
		err := f.retry(ctx, rawURL, fetchTries, func(ctx context.Context) error {
			st, err := part.Stat()
			if err != nil {
				return err
			}
			have := st.Size()
			if have > size {
				have = 0
				if err := part.Truncate(0); err != nil {
					return err
				}
			}
			if have == size {
				resumed = true
				return nil
			}
			resumed = resumed || have > 0
			return f.append(ctx, name, rawURL, part, have, size)
		})
		if err != nil {
			return err
		}
		got, err := hashOf(part)
		if err != nil {
			return err
		}
		if got == sum {
			return nil
		}
		if err := part.Truncate(0); err != nil {
			return err
		}
		if !resumed {
			return fault.New(fault.Untrusted, "fetch", name,
				fmt.Sprintf("%s has SHA-256 %.12s, the signed index says %.12s", rawURL, got, sum),
				"the mirror or something on the way changed it; try another --mirror")
		}
		f.log.Warn("a resumed download does not verify, fetching it anew", "file", name)
		resumed = false
	}
}

// append fetches the bytes of rawURL from offset have on.
func (f *Fetcher) append(ctx context.Context, name, rawURL string, part *os.File, have, size int64) error {
	body, header, err := f.open(ctx, rawURL, have, nil)
	if err != nil {
		return err
	}
	defer body.Close()
	if have > 0 && header != nil && header.Get("Content-Range") == "" { // the server sends it all
		have = 0
		if err := part.Truncate(0); err != nil {
			return err
		}
	}
	if _, err := part.Seek(have, io.SeekStart); err != nil {
		return err
	}
	w := &progressWriter{w: part, name: name, done: have, total: size, tell: f.progress, last: time.Now()}
	n, err := io.Copy(w, io.LimitReader(body, size-have+1))
	if err != nil {
		return err
	}
	switch {
	case have+n > size:
		return errors.Join(part.Truncate(0), errGone{fmt.Sprintf("it has more than the %d bytes that the signed index says", size)})
	case have+n < size && header == nil: // a file: it stays as short as it is
		return errGone{fmt.Sprintf("it has %d bytes, the signed index says %d", have+n, size)}
	case have+n < size:
		return io.ErrUnexpectedEOF
	}
	return nil
}

// open starts reading rawURL at offset. A nil body means "not modified".
func (f *Fetcher) open(ctx context.Context, rawURL string, offset int64, since http.Header) (io.ReadCloser, http.Header, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, nil, errGone{err.Error()}
	}
	if u.Scheme == "file" {
		file, err := os.Open(u.Path)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil, nil, errGone{"no such file"}
			}
			return nil, nil, errGone{err.Error()}
		}
		if _, err := file.Seek(offset, io.SeekStart); err != nil {
			file.Close()
			return nil, nil, err
		}
		return file, nil, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, rawURL, nil)
	if err != nil {
		cancel(nil)
		return nil, nil, errGone{err.Error()}
	}
	maps.Copy(req.Header, since)
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	res, err := f.client.Do(req)
	if err != nil {
		cancel(nil)
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err // retry names the URL
		}
		return nil, nil, err
	}
	fail := func(err error) (io.ReadCloser, http.Header, error) {
		res.Body.Close()
		cancel(nil)
		return nil, nil, err
	}
	switch {
	case res.StatusCode == http.StatusNotModified && since != nil:
		return fail(nil)
	case res.StatusCode == http.StatusPartialContent && offset > 0:
		if !strings.HasPrefix(res.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", offset)) {
			return fail(fmt.Errorf("asked for the bytes from %d, got %q", offset, res.Header.Get("Content-Range")))
		}
	case res.StatusCode == http.StatusOK:
		res.Header.Del("Content-Range")
	case res.StatusCode >= 500, res.StatusCode == http.StatusTooManyRequests, res.StatusCode == http.StatusRequestTimeout:
		return fail(errors.New(res.Status))
	default:
		return fail(errGone{res.Status})
	}
	body := &idleReader{body: res.Body, cancel: cancel}
	body.timer = time.AfterFunc(idleTime, func() { cancel(fmt.Errorf("no data for %v", idleTime)) })
	body.ctx = ctx
	return body, res.Header, nil
}

// retry runs try until it succeeds, with growing pauses, at most tries times. Answers that will not change and faults of this machine end it.
func (f *Fetcher) retry(ctx context.Context, rawURL string, tries int, try func(context.Context) error) error {
	pause := f.pause
	for n := 1; ; n++ {
		err := try(ctx)
		if err == nil {
			return nil
		}
		var gone errGone
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if n == tries || errors.As(err, &gone) || isLocal(err) {
			return fmt.Errorf("%s: %w", rawURL, err)
		}
		level := slog.LevelDebug // the first failure is often a hiccup
		if n > 1 {
			level = slog.LevelWarn
		}
		f.log.Log(ctx, level, "fetch failed, trying again", "url", rawURL, "try", n, "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		pause *= 2
	}
}

// idleReader ends a transfer that no longer moves.
type idleReader struct {
	body   io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func (r *idleReader) Read(p []byte) (int, error) {
	n, err := r.body.Read(p)
	r.timer.Reset(idleTime)
	if err != nil && !errors.Is(err, io.EOF) && r.ctx.Err() != nil {
		err = context.Cause(r.ctx)
	}
	return n, err
}

func (r *idleReader) Close() error {
	r.timer.Stop()
	err := r.body.Close()
	r.cancel(nil)
	return err
}

type progressWriter struct {
	w           io.Writer
	name        string
	done, total int64
	tell        func(string, int64, int64)
	last        time.Time
}

func (p *progressWriter) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	p.done += int64(n)
	if p.tell != nil && time.Since(p.last) >= time.Second {
		p.last = time.Now()
		p.tell(p.name, p.done, p.total)
	}
	return n, err
}

func hashOf(f *os.File) (string, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// checkFile says whether path has that size and hash.
func checkFile(path string, size int64, sum string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != size {
		return fmt.Errorf("%s has %d bytes, not %d", path, st.Size(), size)
	}
	got, err := hashOf(f)
	if err == nil && got != sum {
		err = fmt.Errorf("%s has SHA-256 %.12s, not %.12s", path, got, sum)
	}
	return err
}
