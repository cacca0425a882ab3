package scenario

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/labport"
)

// counterMoves is how often the counter is moved: round head, first and second node.
const counterMoves = 10

// counterProgram counts on stdout, and through a pipe to a second thread that
// counts into a file, until a file named stop is there. It uses only what
// python3-minimal has.
const counterProgram = `import _thread, os, time
r, w = os.pipe()
done = _thread.allocate_lock()
done.acquire()
def second():
    with os.fdopen(r) as lines, open("counted", "w") as log:
        for line in lines:
            log.write(line)
            log.flush()
    done.release()
_thread.start_new_thread(second, ())
i = 0
while not os.path.exists("stop"):
    i += 1
    os.write(w, b"%d\n" % i)
    print(i, flush=True)
    time.sleep(0.02)
os.close(w)
done.acquire()
raise SystemExit(7)
`

// counterFile is its name in the user's home.
const counterFile = "counter.py"

// counterStatus is the exit status of the program above.
const counterStatus = 7

// demoUser is the ordinary user of the lab's head.
const demoUser = "demo"

// asDemo runs a command on the head as its ordinary user and returns its output.
func (r *Run) asDemo(ctx context.Context, stdin string, argv ...string) (string, error) {
	var out, errs bytes.Buffer
	exit, err := r.Lab.Exec(ctx, labport.Cmd{Argv: argv, User: demoUser, Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &errs})
	if err != nil {
		return "", err
	}
	if exit.Status != 0 {
		return "", fmt.Errorf("%s: %v: %s", strings.Join(argv, " "), exit, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// jobsOfDemo are the jobs that mosps shows.
func (r *Run) jobsOfDemo(ctx context.Context) ([]api.JobStatus, error) {
	out, err := r.asDemo(ctx, "", "mosps", "--json")
	if err != nil {
		return nil, err
	}
	var t api.JobTable
	return t.Jobs, json.Unmarshal([]byte(out), &t)
}

// counter moves a threaded program with a file and a pipe round the cluster
// and checks that it noticed nothing.
func counter(ctx context.Context, r *Run) error {
	n1, err := r.member(ctx, bios)
	if err != nil {
		return err
	}
	n2, err := r.member(ctx, uefi)
	if err != nil {
		return err
	}
	return r.countRound(ctx, n1.Node, n2.Node)
}

// countRound is the counter moved round two nodes and its home.
func (r *Run) countRound(ctx context.Context, n1, n2 api.NodeID) error {
	if _, err := r.asDemo(ctx, counterProgram, "sh", "-c", "rm -f stop counted && cat >"+counterFile); err != nil {
		return err
	}
	// Locked: who is where is ours to say, and no balancer's.
	run := r.startAsDemo(ctx, "mosrun", "-h", "-L", "python3", counterFile)
	defer run.end()
	var job api.JobStatus
	if err := r.step("mosrun starts a counter", func() (string, error) {
		var err error
		job, err = r.awaitCounter(ctx, run)
		return "job " + job.ID, err
	}); err != nil {
		return err
	}
	round := []api.NodeID{n1, n2, job.Home}
	var still []string
	err := r.step(fmt.Sprintf("the counter moves %d times round %d machines", counterMoves, len(round)), func() (string, error) {
		for i := range counterMoves {
			to := round[i%len(round)]
			if _, err := r.asDemo(ctx, "", "migrate", strconv.Itoa(job.PID), strconv.Itoa(int(to))); err != nil {
				return "", fmt.Errorf("move %d: %w", i+1, err)
			}
			now, err := r.counters(ctx)
			if err != nil {
				return "", err
			}
			if len(now) != 1 || now[0].Node != to || now[0].Moves != i+1 {
				return "", fmt.Errorf("after move %d mosps shows %+v; want it on node %d", i+1, now, to)
			}
			still = append(still, fmt.Sprintf("%d", now[0].Downtime.Milliseconds()))
		}
		return "stood still " + strings.Join(still, " ") + " ms", nil
	})
	if err != nil {
		return err
	}
	return r.step("every number came exactly once, in order", func() (string, error) { return r.checkCounter(ctx, run) })
}

// counters are the jobs that count.
func (r *Run) counters(ctx context.Context) ([]api.JobStatus, error) {
	all, err := r.jobsOfDemo(ctx)
	return slices.DeleteFunc(all, func(j api.JobStatus) bool { return !slices.Contains(j.Argv, counterFile) }), err
}

// awaitCounter waits until the counter counts.
func (r *Run) awaitCounter(ctx context.Context, run *command) (api.JobStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		all, err := r.counters(ctx)
		if err == nil && len(all) == 1 && run.output() != "" {
			return all[0], nil
		}
		select {
		case <-run.done:
			return api.JobStatus{}, fmt.Errorf("mosrun ended: %v, %w: %s", run.exit, errOrNone(run.err), run.errs.String())
		case <-ctx.Done():
			return api.JobStatus{}, fmt.Errorf("mosps shows %d jobs, the counter has said %q: %w", len(all), run.output(), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (r *Run) checkCounter(ctx context.Context, run *command) (string, error) {
	if _, err := r.asDemo(ctx, "", "touch", "stop"); err != nil {
		return "", err
	}
	select {
	case <-run.done:
	case <-time.After(time.Minute):
		return "", fmt.Errorf("the counter does not end")
	}
	if run.err != nil || run.exit.Status != counterStatus || run.errs.Len() > 0 {
		return "", fmt.Errorf("mosrun ended with %v, %w, and said %q; want exit status %d", run.exit, errOrNone(run.err), run.errs.String(), counterStatus)
	}
	counted, err := r.asDemo(ctx, "", "cat", "counted")
	if err != nil {
		return "", err
	}
	for what, text := range map[string]string{"output": run.output(), "file": counted} {
		for i, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
			if line != strconv.Itoa(i+1) {
				return "", fmt.Errorf("line %d of the %s is %q", i+1, what, line)
			}
		}
	}
	if run.output() != counted {
		return "", fmt.Errorf("the output has %d bytes, the file %d", len(run.output()), len(counted))
	}
	// The agent forgets the job a moment after mosrun has its status.
	left, err := r.counters(ctx)
	for end := time.Now().Add(20 * time.Second); err == nil && len(left) > 0 && time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		left, err = r.counters(ctx)
	}
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("mosps still shows %+v", left)
	}
	return fmt.Sprintf("%d numbers", strings.Count(counted, "\n")), err
}

// errOrNone lets an error be named that may not be there.
func errOrNone(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}

// command is one that runs on the head meanwhile.
type command struct {
	end  context.CancelFunc
	done chan struct{} // closed when it has ended; then exit and err hold
	exit labport.Exit
	err  error
	errs bytes.Buffer

	mu  sync.Mutex // guards the following
	out bytes.Buffer
}

func (r *Run) startAsDemo(ctx context.Context, argv ...string) *command {
	ctx, cancel := context.WithCancel(ctx)
	c := &command{end: cancel, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		c.exit, c.err = r.Lab.Exec(ctx, labport.Cmd{Argv: argv, User: demoUser, Stdout: c, Stderr: &c.errs})
	}()
	return c
}

func (c *command) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}

func (c *command) output() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.String()
}
