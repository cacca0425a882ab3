package nodecli

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/monitor"
	"mosimg/internal/table"
)

// mosmonEvery is how often the agent is asked: as often as nodes measure themselves.
const mosmonEvery = time.Second

// answer is what the agent said, or why it did not.
type answer struct {
	table api.MemberTable
	err   error
}

// watch draws the bars until q, ctrl-C, a signal or the end of ctx. An agent that does
// not answer is asked again, and its last answer stays on the screen.
func watch(ctx context.Context, s *screen, v monitor.View, ask func(context.Context) (api.MemberTable, error)) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGHUP, unix.SIGQUIT)
	defer stop()
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, unix.SIGWINCH)
	defer signal.Stop(resized)
	suspended := make(chan os.Signal, 1)
	signal.Notify(suspended, unix.SIGTSTP)
	defer signal.Stop(suspended)

	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer)
	crashed := make(chan string, 2)
	guarded(crashed, func() { poll(ctx, ask, answers) })
	pressed := make(chan []monitor.Key)
	guarded(crashed, func() {
		s.keys(ctx, pressed)
		close(pressed)
	})

	var now monitor.Snapshot
	var heard time.Time
	for {
		width, height := s.size()
		if err := s.draw(monitor.Render(v, now, width, height)); err != nil {
			return fault.New(fault.Environment, "draw on", "the terminal", err, "")
		}
		select {
		case <-ctx.Done():
			return nil
		case a := <-answers:
			if a.err == nil {
				now, heard = monitor.Snapshot{Table: a.table, Known: true}, time.Now()
				continue
			}
			now.Problem = "trying again: " + a.err.Error()
			if now.Known {
				now.Problem = fmt.Sprintf("no news for %s, %s", table.Age(time.Since(heard).Round(time.Second)), now.Problem)
			}
		case text := <-crashed:
			panic(text)
		case keys, ok := <-pressed:
			if !ok { // nobody is there any more
				return nil
			}
			for _, k := range keys {
				var quit bool
				if v, quit = v.Press(k, now, width, height); quit {
					return nil
				}
				if k == monitor.CtrlL {
					s.clear()
				}
			}
		case <-resized:
			s.clear()
		case <-suspended:
			s.leave()
			if err := suspend(); err != nil {
				return fault.New(fault.Environment, "stop", "mosmon", err, "")
			}
			if err := s.enter(); err != nil {
				return err
			}
		}
	}
}

// guarded runs f in a goroutine whose panic goes to crashed: by itself it would end the process
// at once, and with the terminal as it is.
func guarded(crashed chan<- string, f func()) {
	go func() {
		defer func() {
			if p := recover(); p != nil {
				crashed <- fmt.Sprintf("%v\n%s", p, debug.Stack())
			}
		}()
		f()
	}()
}

// suspend stops this process until it is continued. The signal goes to the very thread that
// sends it, which therefore does not return before: another thread would let it draw on.
func suspend() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGSTOP)
}

// poll asks again and again, and hands each answer over.
func poll(ctx context.Context, ask func(context.Context) (api.MemberTable, error), answers chan<- answer) {
	tick := time.NewTicker(mosmonEvery)
	defer tick.Stop()
	for {
		t, err := ask(ctx)
		select {
		case <-ctx.Done():
			return
		case answers <- answer{t, err}:
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
