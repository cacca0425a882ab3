package swrk

import (
	"errors"
	"slices"
	"strings"
)

// reasons are the words for what CRIU says most often, by a part of its
// line. The first that matches wins.
var reasons = []struct{ part, words string }{
	{"Unexpected rt vDSO area bounds", "this CRIU is too old for the running kernel (4.1 or newer is needed for Linux 6.13)"},
	{"io_uring", "a process uses io_uring"},
	{"Connected TCP socket", "a process has a TCP connection"},
	{"tcp_repair", "a process has a TCP connection"},
	{"Can't dump ghost file", "a deleted file that is still open is too large to carry"},
	{"Some file locks are hold", "a process holds a file lock"},
	{"External socket is used", "a process is connected to a unix socket outside of the job"},
	{"Can't dump half of stream unix connection", "a process is connected to a unix socket outside of the job"},
	{"Unsupported socket family", "a process has a socket of a kind that CRIU does not carry"},
	{"is being debugged", "a process is being debugged"},
	{"seized by another", "a process is being debugged"},
	{"Can't get rlimit", "CRIU may not look at other users' processes (the agent lacks CAP_SYS_RESOURCE)"},
	{"Unable to create a thread: -17", "a process number of the job is taken in the capsule"},
}

// symptoms are lines that follow from another error and explain nothing.
var symptoms = []string{
	"exited, status=", "killed by signal", "Dumping FAILED", "Restoring FAILED", "Dump files", "Dump mappings", "Pre-dumping FAILED",
	// What is said on the way out of a task that could not be stopped.
	"Unable to detach from",
	// Tried at every start, and harmless where it is missing.
	"Unable to create tun", "Can't setup RLIMIT_NOFILE for self",
}

// Explain makes one line out of a log of CRIU's: the first error that
// explains something, in words where we have them. What follows the first
// error is consequences. It is "" when the log has no error.
func Explain(log string) string {
	first := ""
	for line := range strings.Lines(log) {
		text, ok := errorText(line)
		if !ok {
			continue
		}
		symptom := false
		for _, s := range symptoms {
			symptom = symptom || strings.Contains(text, s)
		}
		if !symptom {
			first = text
			break
		}
		if first == "" {
			first = text
		}
	}
	for _, r := range reasons {
		if strings.Contains(first, r.part) {
			return r.words + " (criu: " + first + ")"
		}
	}
	return first
}

// ErrRace is a dump that failed because a task of the tree came to its end while
// CRIU was stopping it: the same dump is likely to succeed a moment later.
var ErrRace = errors.New("a process ended while it was being stopped")

// races are the lines of compel_stop_task and compel_wait_task (CRIU 4.1,
// compel/src/lib/infect.c) and of collect_task (criu/seize.c) about a task that has gone, or has
// become another one, between being found and being stopped. Before these nothing was done to the
// tree. Not among them is "Timeout reached": what took ten seconds will again.
var races = []string{
	"Unable to detach from", "Unseizable non-zombie", "Task pid reused while suspending", "task not stopped after seize", "zombie found while seizing",
}

// Raced tells whether a log of CRIU's is that of a dump to which ErrRace happened:
// all of its errors are of that kind, or follow from it.
func Raced(log string) bool {
	raced := false
	for line := range strings.Lines(log) {
		text, ok := errorText(line)
		if !ok {
			continue
		}
		is := func(part string) bool { return strings.Contains(text, part) }
		switch {
		case slices.ContainsFunc(races, is):
			raced = true
		case !slices.ContainsFunc(symptoms, is):
			return false
		}
	}
	return raced
}

// errorText is what an error line says, without its time stamp, pid and place:
// "(00.003910)  12345: Error (criu/vdso.c:1): text".
func errorText(line string) (string, bool) {
	_, text, ok := strings.Cut(line, "Error (")
	if !ok {
		return "", false
	}
	if _, after, ok := strings.Cut(text, "): "); ok {
		text = after
	}
	return strings.TrimSpace(text), true
}
