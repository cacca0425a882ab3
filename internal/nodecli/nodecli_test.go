package nodecli

import (
	"bytes"
	"encoding/json"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"mosimg/configs"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// run runs mosagent as if started with these arguments.
func run(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = Main(t.Context(), &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Args: args, Pid: 4711})
	return status, out.String(), errs.String()
}

func TestVerbByName(t *testing.T) {
	for _, tc := range []struct {
		args []string
		pid  int
		want string
	}{
		{[]string{"/init", "quiet", "splash"}, 1, "init"}, // the kernel's words are not ours
		{[]string{"/usr/bin/mosagent"}, 1, "init"},
		{[]string{"/usr/bin/mosmon", "--once"}, 5, "mosmon --once"},
		{[]string{"mosagent", "mosmon", "--once"}, 5, "mosmon --once"},
		{[]string{"/usr/bin/mosrun", "-3", "init"}, 5, "mosrun -3 init"},
		{[]string{"mosps"}, 5, "mosps"},
		{[]string{"/usr/bin/mosctl", "whois", "3"}, 5, "mosctl whois 3"},
		{[]string{"./migrate", "1-7", "home"}, 5, "migrate 1-7 home"},
		{[]string{"/sbin/poweroff"}, 5, "poweroff"},
		{[]string{"/usr/bin/mosagent-amd64", "agent"}, 5, "agent"},
		{nil, 5, ""},
	} {
		if _, got := verbOf(tc.args, tc.pid); strings.Join(got, " ") != tc.want {
			t.Errorf("verbOf(%q, %d) = %q; want %q", tc.args, tc.pid, got, tc.want)
		}
	}
}

// A name in an image's /usr/bin that is no verb would be the whole mosagent there, and a
// tool without a name could not be found.
func TestImageHasAllTools(t *testing.T) {
	data, err := configs.Profiles.ReadFile("profiles/x86_64.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var profile struct{ Tools []string }
	if err := yaml.Unmarshal(data, &profile); err != nil {
		t.Fatal(err)
	}
	want := slices.Sorted(maps.Keys(tools))
	want = slices.DeleteFunc(want, func(name string) bool { return name == "init" })
	slices.Sort(profile.Tools)
	if !slices.Equal(profile.Tools, want) {
		t.Errorf("the image has the tools %q; want %q", profile.Tools, want)
	}
	verbs := newRoot(&Env{})
	for _, name := range want {
		if c, _, err := verbs.Find([]string{name}); err != nil || c.Name() != name {
			t.Errorf("tool %s is no verb: %v", name, err)
		}
	}
}

// Each refusal is one clear line and has the status of its kind.
func TestRefusals(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "s")
	for _, tc := range []struct {
		args []string
		kind fault.Kind
		text string
	}{
		{[]string{"mosagent", "dance"}, fault.Usage, "dance"},
		{[]string{"mosagent", "agent"}, fault.Usage, "does not know its head"},
		{[]string{"mosagent", "agent", "--head", "https://h:1"}, fault.Usage, "does not know its head"},
		{[]string{"mosagent", "agent", "--nonsense"}, fault.Usage, "--help"},
		{[]string{"mosagent", "agent", "x"}, fault.Usage, "--help"},
		{[]string{"mosagent", "init"}, fault.Usage, "not process 1"},
		{[]string{"init"}, fault.Usage, "not process 1"},
		{[]string{"mosagent", "net", "--address", "10.0.0.1"}, fault.Usage, "prefix"},
		{[]string{"mosmon", "--socket", gone}, fault.Unavailable, "not running"},
		{[]string{"mosmon", "--once", "--socket", gone}, fault.Unavailable, "not running"},
		{[]string{"mosmon", "--json", "-m"}, fault.Usage, "--json is the whole table"},
		{[]string{"mosmon", "-l", "-m"}, fault.Usage, "-l and -m exclude each other"},
		{[]string{"mosmon", "-wv", "--once"}, fault.Usage, "-w and -v exclude each other"},
		{[]string{"mosmon", "--nonsense"}, fault.Usage, "unknown flag"},
		{[]string{"mosmon", "-x"}, fault.Usage, "unknown shorthand"},
		{[]string{"mosmon", "3"}, fault.Usage, "+ and the number"},
		{[]string{"mosmon", "+0"}, fault.Usage, "+ and the number"},
		{[]string{"mosmon", "+99999999999"}, fault.Usage, "+ and the number"},
		{[]string{"mosmon", "+1", "+2"}, fault.Usage, "at most 1"},
		{[]string{"mosctl", "dance"}, fault.Usage, "dance"},
		{[]string{"mosctl", "whois", "--nonsense"}, fault.Usage, "unknown flag"},
		{[]string{"mosctl", "whois", "1", "2"}, fault.Usage, "at most 1"},
		{[]string{"mosctl", "whois", "1", "--socket", gone}, fault.Unavailable, "not running"},
		{[]string{"mosctl", "status", "--socket", gone}, fault.Unavailable, "not running"},
		{[]string{"mosctl", "getload", "--socket", gone}, fault.Unavailable, "not running"},
		{[]string{"poweroff"}, fault.Refused, "not mosimg's init"},
		{[]string{"mosagent", "probe-criu", "--criu", t.TempDir()}, fault.Environment, "only jobs placed at start"},
	} {
		status, out, errs := run(t, tc.args...)
		if status != int(tc.kind) || !strings.Contains(errs, tc.text) || strings.Count(strings.TrimSpace(errs), "\n") > 0 || out != "" {
			t.Errorf("%q: status %d, stdout %q, stderr %q; want status %d and one line with %q", tc.args, status, out, errs, tc.kind, tc.text)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"mosagent", "--help"}, {"mosmon", "--help"}, {"mosagent"}, {"mosrun", "--help"}, {"mosagent", "mosrun", "--help"}, {"mosps", "--help"}, {"migrate", "-h"}, {"mosctl"}, {"mosctl", "whois", "--help"}, {"mosmon", "-h"}} {
		status, out, errs := run(t, args...)
		if status != 0 || !strings.Contains(out, "Usage:") || errs != "" {
			t.Errorf("%q: status %d, %q, %q", args, status, out, errs)
		}
	}
}

func load(l, u float64, cpus int) *api.LoadVector {
	return &api.LoadVector{Load: l, Utilisation: u, CPUs: cpus, MemTotal: 4 << 30, MemFree: 1 << 30}
}

var members = api.MemberTable{Cluster: "c", Self: 1, Members: []api.Member{
	{Node: 1, Name: "head", Self: true, Liveness: api.Alive, Load: load(0, 0.03, 4), AgeMillis: 400},
	{Node: 2, Name: "node2", Address: "10.77.0.128", Migration: true, Liveness: api.Alive, Load: load(8, 1, 4), AgeMillis: 1200},
	{Node: 3, Name: "node3", Liveness: api.Dead, Load: load(3, 1, 1), AgeMillis: 99000},
	{Node: 11, Name: "küche", Liveness: api.Suspect},
}}

// agentSocket is an agent that knows the table above.
func agentSocket(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	serveAgent(t, path)
	return path
}

// serveAgent is that agent at a path, until stop or the test's end.
func serveAgent(t *testing.T, path string) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathMembers, func(w http.ResponseWriter, _ *http.Request) { unixhttp.Reply(w, members) })
	srv := &http.Server{Handler: mux}
	mux.HandleFunc("GET "+api.PathStatus, func(w http.ResponseWriter, _ *http.Request) {
		unixhttp.Reply(w, api.AgentStatus{State: api.StatePending, Fingerprint: "aaaa-bbbb", Address: "10.77.0.9"})
	})
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return func() { srv.Close() }
}

func TestStatus(t *testing.T) {
	socket := agentSocket(t)
	status, out, errs := run(t, "mosagent", "status", "--socket", socket)
	if status != 0 || errs != "" || !strings.Contains(out, "pending") || !strings.Contains(out, "aaaa-bbbb") {
		t.Errorf("status: %d, %q, %q", status, out, errs)
	}
	status, out, _ = run(t, "mosagent", "status", "--json", "--socket", socket)
	var got api.AgentStatus
	if err := json.Unmarshal([]byte(out), &got); status != 0 || err != nil || got.State != api.StatePending {
		t.Errorf("status --json: %d, %v, %+v", status, err, got)
	}
}
