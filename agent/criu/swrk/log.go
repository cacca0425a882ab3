package swrk

import (
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
