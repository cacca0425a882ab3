package nodecli

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/jobs/client/clienttest"
)

// shell is an interactive bash on a terminal of its own, at which a test types.
type shell struct {
	t    *testing.T
	far  *os.File
	seen strings.Builder
}

func newShell(t *testing.T, agent *clienttest.Agent) *shell {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip(err)
	}
	near, far := openPTY(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "mosrun")
	if err := os.Symlink(self, link); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bash, "--norc", "--noprofile", "-i")
	cmd.Env = append(os.Environ(), "MOSRUN="+link+" --socket "+agent.Socket, "PS1=ready> ", "TERM=dumb", "HISTFILE=")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = near, near, near
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		_ = cmd.Wait()
	})
	s := &shell{t: t, far: far}
	s.expect("ready> ")
	return s
}

func (s *shell) enter(keys string) {
	s.t.Helper()
	if _, err := s.far.WriteString(keys); err != nil {
		s.t.Fatal(err)
	}
}

// expect reads until a text appears, and forgets what came up to it.
func (s *shell) expect(text string) {
	s.t.Helper()
	buf := make([]byte, 4096)
	for {
		all := s.seen.String()
		if before, after, ok := strings.Cut(all, text); ok {
			s.t.Logf("%s%s", before, text)
			s.seen.Reset()
			s.seen.WriteString(after)
			return
		}
		s.far.SetReadDeadline(time.Now().Add(15 * time.Second))
		n, err := s.far.Read(buf)
		if err != nil {
			s.t.Fatalf("%v; the terminal shows %q; want %q", err, all, text)
		}
		s.seen.Write(buf[:n])
	}
}

// ctrl-Z, fg and ctrl-C at a terminal do to a job what they do to a program.
func TestMosrunAtATerminal(t *testing.T) {
	agent := clienttest.New(t)
	s := newShell(t, agent)
	s.enter("$MOSRUN sh -c 'echo u''p; read x; echo got $x; exit 5'\n")
	s.expect("up\r\n")
	s.enter("\x1a")
	s.expect("Stopped")
	job := agent.Jobs()[0]
	if stops, _ := job.Stops(); stops != 1 {
		t.Errorf("the job was frozen %d times; want once", stops)
	}
	s.expect("ready> ")
	s.enter("fg\n")
	s.expect("'\r\n") // bash shows the command
	s.enter("hello\n")
	s.expect("got hello\r\n")
	s.expect("ready> ") // what is typed ahead is the job's
	s.enter("echo status $?\n")
	s.expect("status 5\r\n")
	if _, conts := job.Stops(); conts < 1 {
		t.Error("the job was not let run on")
	}

	s.expect("ready> ")
	s.enter("$MOSRUN sleep 100\n")
	for len(agent.Jobs()) < 2 || agent.Jobs()[1].Attached() == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	s.enter("\x03")
	s.expect("ready> ")
	s.enter("echo status $?\n")
	s.expect("status 130\r\n")
	if got := agent.Jobs()[1].Signals(); len(got) != 1 || got[0].Number != 2 || !got[0].Group {
		t.Errorf("signals %v; want one SIGINT for the group", got)
	}
}

// A mosrun in the background takes no keys from the shell, is not stopped
// for having tried, and reads on once it is brought to the foreground.
func TestMosrunInTheBackground(t *testing.T) {
	agent := clienttest.New(t)
	s := newShell(t, agent)
	s.enter("$MOSRUN sh -c 'echo u''p; read x; echo got $x' &\n")
	s.expect("up\r\n")
	time.Sleep(2 * 200 * time.Millisecond) // in which it would have been stopped
	s.enter("jobs; echo mi''ne\n")
	s.expect("Running")
	s.expect("mine\r\n")
	s.expect("ready> ")
	s.enter("fg\n")
	s.expect("'\r\n")
	s.enter("hello\n")
	s.expect("got hello\r\n")
}
