package nodecli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"mosimg/agent/jobs/client"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// Exit statuses of mosrun that are not the program's: as env, nohup and
// timeout have them.
const (
	exitMosrun   = 125 // mosrun failed, or the job was lost
	exitCannot   = 126 // the program was found and cannot be run
	exitNotFound = 127
)

const mosrunHelp = `mosrun runs a program as a job: it and all that it starts can move to other
machines of the cluster while it runs, and neither it nor you notice. Its files
stay those of this machine, and so do its stdin, stdout and stderr, which are
pipes, the signals it gets through mosrun (INT TERM HUP QUIT USR1 USR2 ALRM
ABRT WINCH, ctrl-Z and fg), and its exit status. It has your environment,
working directory, umask, nice value, groups and limits.

Usage: mosrun [FLAGS] PROGRAM [ARG...]

  -b         start on the best node, as loads were last heard (so it is if
             nothing is said): home, while it has a CPU to spare
  -h         start at home, on this machine
  -NUMBER    start on the node with this number, or with this IPv4 address
  -r HOST    start on the node with this number, name or address
  -j LIST    start on one of these nodes, at random: -j 1-4,7
  -m MB      with -b or -j: only on a node with so much free memory (MiB)
  -F         start at home if the node is not available
  -L         lock: the job moves only if you move it, or its node is leaving;
             -l is the default
  --socket PATH   the agent's unix socket
  --help

Flags end at the first word that is none, or at --.

mosrun reads ahead of the program, up to 256 KiB of stdin: in a loop over a
list give it </dev/null. While the agent or the job's node is away for a
while, it waits.

A limit of the address space (ulimit -v) is the program's. mosrun itself needs
some 600 MiB of it on a 64-bit machine: set a smaller one within the job, by
mosrun sh -c 'ulimit -v 200000; exec PROGRAM'.

Exit status: the program's own, or death by the same signal. And:
  125  mosrun failed and said why: the program was not started, or not all of
       its output could be written, or it was lost with its node
       ("mosrun: job ID was lost: ...")
  126  the program cannot be executed, or the working directory not entered
  127  the program was not found
`

// exitStatus ends the command with a status of its own, after all was said.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

func newMosrunCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "mosrun [FLAGS] PROGRAM [ARG...]",
		Short: "Run a program that can move to other machines",
		// The flags are MOSIX's, and those after PROGRAM are the program's.
		DisableFlagParsing: true,
		RunE: func(c *cobra.Command, args []string) error {
			flags, program, err := parseRun(args)
			switch {
			case err != nil:
				fmt.Fprintln(env.Stderr, "mosrun:", err)
				return exitStatus(exitMosrun)
			case flags.help:
				_, err := io.WriteString(env.Stdout, mosrunHelp)
				return err
			}
			m := &mosrun{env: env, agent: client.Agent{Socket: flags.socket}, flags: flags}
			return exitStatus(m.run(c.Context(), program))
		},
	}
}

// mosrun is one run of the command.
type mosrun struct {
	env   *Env
	agent client.Agent
	flags runFlags
}

func (m *mosrun) say(format string, a ...any) {
	fmt.Fprintf(m.env.Stderr, "mosrun: "+format+"\n", a...)
}

// run runs the program as a job and returns the exit status, unless it ends
// this process by a signal.
func (m *mosrun) run(ctx context.Context, program []string) int {
	start, err := caller()
	if err != nil {
		m.say("%v", err)
		return exitMosrun
	}
	start.Argv, start.Locked = program, m.flags.locked
	if start.Dir, err = workingDir(); err != nil {
		m.say("%v", err)
		return exitCannot
	}
	start.Best, start.Bytes = m.flags.best(), m.flags.memMiB<<20
	if start.Node, err = m.place(ctx); err != nil {
		m.say("%v", err)
		return exitMosrun
	}
	// ps and pkill at home find the job by its program's name.
	if err := os.WriteFile("/proc/self/comm", []byte(filepath.Base(program[0])), 0); err != nil {
		m.say("%v", err)
	}
	signals := catchSignals(start.Ignored)
	id, early, err := m.start(ctx, start, signals)
	if err != nil {
		m.say("%v", err)
		return startStatus(err)
	}
	stdin := 0
	if start.NoStdin {
		stdin = -1
	}
	session, err := client.New(client.Config{
		Agent: m.agent, Job: id, Stdin: stdin, Stdout: 1, Stderr: 2,
		Note: func(text string) { m.say("%s", text) },
	})
	if err != nil {
		m.say("%v", err)
		return exitMosrun
	}
	go func() {
		for _, sig := range early {
			forward(ctx, session, sig)
		}
		for sig := range signals {
			forward(ctx, session, sig)
		}
	}()
	result, err := session.Run(ctx)
	if err != nil {
		m.say("job %s: %v", id, err)
		return exitMosrun
	}
	return m.end(id, result)
}

// place is where the job is to start.
func (m *mosrun) place(ctx context.Context) (string, error) {
	if len(m.flags.list) == 0 {
		return m.flags.node, nil
	}
	table, err := m.agent.Members(ctx)
	if err != nil {
		return "", err
	}
	fit := candidates(table.Members, m.flags.list, m.flags.memMiB)
	switch {
	case len(fit) > 0:
		if n := fit[rand.IntN(len(fit))]; !n.Self {
			return fmt.Sprint(int(n.Node)), nil
		}
		return "", nil
	case m.flags.force:
		m.say("none of the nodes is available; the job runs at home")
		return "", nil
	}
	return "", fault.New(fault.Unavailable, "choose a node", "", "none of the list is alive and has the memory", "mosmon shows the nodes; -F runs the job at home then")
}

// startPatience is how long a start goes on after a signal that would have ended
// the program; then mosrun ends without an answer.
const startPatience = 5 * time.Second

// start starts the job. Signals that arrive meanwhile are for it: they are
// returned in early.
func (m *mosrun) start(ctx context.Context, start api.JobStart, signals <-chan os.Signal) (id string, early []os.Signal, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	go func() {
		defer close(done)
		id, err = m.agent.Start(ctx, start)
		if (start.Node != "" || start.Best) && m.flags.force && fault.KindOf(err) == fault.Unavailable && ctx.Err() == nil {
			m.say("%v; the job runs at home", err)
			start.Node, start.Best = "", false
			id, err = m.agent.Start(ctx, start)
		}
	}()
	for {
		select {
		case <-done:
			return id, early, err
		case sig := <-signals:
			if sig == syscall.SIGTSTP { // there is no job to freeze yet
				raise(syscall.SIGTSTP)
				continue
			}
			early = append(early, sig)
			if s, ok := sig.(syscall.Signal); ok && forwarded[s].deadly {
				time.AfterFunc(startPatience, func() { cancel(&interrupted{s}) })
			}
		}
	}
}

// interrupted says that a start was given up.
type interrupted struct{ by syscall.Signal }

func (i *interrupted) Error() string {
	return "the agent does not answer; mosps shows whether the job was started"
}

// startStatus is the exit status of a mosrun whose program was not started.
func startStatus(err error) int {
	if i := (*interrupted)(nil); errors.As(err, &i) {
		dieBy(i.by)
	}
	var r *unixhttp.Remote
	if errors.As(err, &r) {
		switch {
		case r.Kind == fault.NotFound && r.Errno == syscall.ENOENT:
			return exitNotFound
		case r.Kind == fault.Refused && r.Errno != 0: // of the exec, or of the change to the directory
			return exitCannot
		}
	}
	return exitMosrun
}

// end is the exit status of a mosrun whose job has ended, or its death.
func (m *mosrun) end(id string, r client.Result) int {
	failed := false
	for _, s := range []struct {
		name string
		err  error
	}{{"standard output", r.Stdout}, {"standard error", r.Stderr}} {
		if s.err != nil && !errors.Is(s.err, syscall.EPIPE) {
			m.say("write %s: %v", s.name, s.err)
			failed = true
		}
	}
	brokenPipe := errors.Is(r.Stdout, syscall.EPIPE) || errors.Is(r.Stderr, syscall.EPIPE)
	switch {
	case r.Lost != "":
		m.say("job %s was lost: %s", id, strings.TrimSpace(r.Lost))
		return exitMosrun
	case failed:
		return exitMosrun
	case r.Signal != 0:
		dieBy(syscall.Signal(r.Signal))
		return 128 + r.Signal
	case brokenPipe && r.Exit == 0:
		// The program took its last bytes for written. Had it written them itself, it
		// would have died of it.
		dieBy(syscall.SIGPIPE)
	}
	return r.Exit
}
