package tftpd

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// need is a client of the distribution, which reads the protocol in its own way.
func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed", program)
	}
	return path
}

// Clients that others wrote get the file as it is, with each of the ways that
// they have to ask for it, whatever ports it comes from.
func TestClientsOfOthers(t *testing.T) {
	for _, ports := range []string{"", "single", "20960-21023"} {
		for _, tt := range []struct {
			name string
			argv []string // HOST, PORT, FILE and OUT are filled in
			want string   // in the log's line of the transfer
		}{
			{"tftp-hpa", []string{"tftp", "-m", "binary", "HOST", "PORT", "-c", "get", "FILE", "OUT"}, "blksize=512 windowsize=1"},
			{"tftp-hpa as it comes, in netascii", []string{"tftp", "HOST", "PORT", "-c", "get", "FILE", "OUT"}, "blksize=512"},
			{"atftp", []string{"atftp", "--get", "-r", "FILE", "-l", "OUT", "HOST", "PORT"}, "blksize=512 windowsize=1"},
			{"atftp with options", []string{"atftp", "--option", "tsize", "--option", "timeout 2", "--option", "blksize 1432", "--get", "-r", "FILE", "-l", "OUT", "HOST", "PORT"}, "blksize=1432 windowsize=1"},
			{"atftp with windows", []string{"atftp", "--option", "windowsize 16", "--option", "blksize 1468", "--get", "-r", "FILE", "-l", "OUT", "HOST", "PORT"}, "blksize=1468 windowsize=16"},
			{"curl", []string{"curl", "-sf", "--tftp-blksize", "1468", "-o", "OUT", "tftp://HOST:PORT/FILE"}, "blksize=1468"},
			{"curl without options", []string{"curl", "-sf", "--tftp-no-options", "-o", "OUT", "tftp://HOST:PORT/FILE"}, "blksize=512"},
			{"busybox", []string{"busybox", "tftp", "-g", "-b", "65464", "-r", "FILE", "-l", "OUT", "HOST", "PORT"}, "blksize=1468"},
		} {
			t.Run(strings.TrimSuffix(tt.name+" ports "+ports, " ports "), func(t *testing.T) {
				program := need(t, tt.argv[0])
				p, err := ParsePorts(ports)
				if err != nil {
					t.Fatal(err)
				}
				addr, log, loader, stop := start(t, func(s *Server) { s.Ports = p })
				host, port, err := net.SplitHostPort(addr)
				if err != nil {
					t.Fatal(err)
				}
				out := filepath.Join(t.TempDir(), "out")
				var args []string
				for _, a := range tt.argv[1:] {
					args = append(args, strings.NewReplacer("HOST", host, "PORT", port, "FILE", "snponly.efi", "OUT", out).Replace(a))
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				said, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
				if err != nil {
					t.Errorf("%v: %s", err, said)
				}
				if got, err := os.ReadFile(out); err != nil || string(got) != loader {
					t.Errorf("%d bytes, %v; want %d: %s", len(got), err, len(loader), said)
				}
				stop()
				if !strings.Contains(log.String(), tt.want) {
					t.Errorf("no %q in:\n%s", tt.want, log.String())
				}
			})
		}
	}
}
