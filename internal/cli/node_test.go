package cli

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// fakeHead answers the admin API from a list.
type fakeHead struct {
	recs []api.NodeRecord
	acts []api.NodeAct
	wins []api.Adopt
}

func listen(t *testing.T, name string, mux http.Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return path
}

func (h *fakeHead) start(t *testing.T) string {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathNodes, func(w http.ResponseWriter, r *http.Request) { unixhttp.Reply(w, h.recs) })
	mux.HandleFunc("POST "+api.PathNodeAct, func(w http.ResponseWriter, r *http.Request) {
		var a api.NodeAct
		unixhttp.ReadJSON(w, r, &a)
		h.acts = append(h.acts, a)
		if a.Node == "9" {
			unixhttp.Fail(w, fault.New(fault.NotFound, "find node", "9", "no machine has this number", ""))
			return
		}
		unixhttp.Reply(w, api.NodeRecord{Node: 2, Name: "node2", MAC: "52:54:00:00:00:02", State: api.Approved})
	})
	mux.HandleFunc("POST "+api.PathAdopt, func(w http.ResponseWriter, r *http.Request) {
		var a api.Adopt
		unixhttp.ReadJSON(w, r, &a)
		h.wins = append(h.wins, a)
		unixhttp.Reply(w, a)
	})
	return listen(t, "head.sock", mux)
}

// mosimg runs the command and gives its status and texts.
func mosimg(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = Main(t.Context(), &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Args: args})
	return status, out.String(), errs.String()
}

func TestNodeLs(t *testing.T) {
	h := &fakeHead{recs: []api.NodeRecord{
		{Node: 1, Name: "head", MAC: "52:54:00:00:00:01", Address: "10.77.0.1", State: api.Approved, Role: "head", Fingerprint: "aaaa-bbbb-cccc-dddd", Inventory: &api.Inventory{CPUs: 4, MemoryBytes: 16 << 30}},
		{Node: 2, Name: "node2", MAC: "52:54:00:00:00:02", State: api.Approved, Image: strings.Repeat("a", 64), Offered: strings.Repeat("a", 64)},
		{Node: 3, Name: "node3", MAC: "52:54:00:00:00:04", State: api.Approved, Image: strings.Repeat("a", 64), Offered: strings.Repeat("b", 64)},
		{MAC: "52:54:00:00:00:03", State: api.Pending, Alert: "two machines with this MAC"},
	}}
	head := h.start(t)
	agent := http.NewServeMux()
	agent.HandleFunc("GET "+api.PathMembers, func(w http.ResponseWriter, r *http.Request) {
		unixhttp.Reply(w, api.MemberTable{Members: []api.Member{{Node: 1, Liveness: api.Alive, Since: time.Now().Add(-3 * time.Hour)}}})
	})
	sock := listen(t, "agent.sock", agent)

	status, out, errs := mosimg(t, "node", "ls", "--socket", head, "--agent-socket", sock)
	if status != 0 || errs != "" {
		t.Fatalf("status %d, stderr %q", status, errs)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 6 {
		t.Fatalf("output:\n%s", out)
	}
	for i, want := range []string{
		"NODE NAME STATE ALIVE SINCE ADDRESS MAC RUNS OFFERED REBOOT CPUS MEMORY FINGERPRINT",
		"1 head approved alive 3h 10.77.0.1 52:54:00:00:00:01 - - - 4 16G aaaa-bbbb-cccc-dddd",
		"2 node2 approved - - - 52:54:00:00:00:02 aaaaaaaaaaaa aaaaaaaaaaaa same - - -",
		"3 node3 approved - - - 52:54:00:00:00:04 aaaaaaaaaaaa bbbbbbbbbbbb changes - - -",
		"- - pending - - - 52:54:00:00:00:03 - - - - - -",
		"ALERT 52:54:00:00:00:03: two machines with this MAC",
	} {
		if got := strings.Join(strings.Fields(lines[i]), " "); got != want {
			t.Errorf("line %d = %q; want %q", i, got, want)
		}
	}

	// Without an agent the list is still good, and says what it lacks.
	status, out, errs = mosimg(t, "node", "ls", "--json", "--socket", head, "--agent-socket", "/nonexistent")
	var recs []api.NodeRecord
	if err := json.Unmarshal([]byte(out), &recs); err != nil || status != 0 || len(recs) != 4 {
		t.Errorf("status %d, %v, output %s", status, err, out)
	}
	if strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "alive") {
		t.Errorf("stderr %q; want one line about it", errs)
	}
}

func TestNodeShow(t *testing.T) {
	h := &fakeHead{recs: []api.NodeRecord{{Node: 2, Name: "node2", MAC: "52:54:00:00:00:02", State: api.Approved, Fingerprint: "abcd-0000-0000-0000",
		Inventory: &api.Inventory{CPUs: 1, CPUModel: "QEMU", Arch: "amd64", CRIU: api.CRIUStatus{Reason: "no criu"}, NICs: []api.NIC{{Name: "eth0", MAC: "52:54:00:00:00:02", Carrier: true, Mbit: 100}}}}}}
	head := h.start(t)
	status, out, _ := mosimg(t, "node", "show", "abcd", "--socket", head, "--agent-socket", "/nonexistent")
	for _, want := range []string{"node2", "1 x QEMU (amd64)", "no: no criu", "100 Mbit/s"} {
		if status != 0 || !strings.Contains(out, want) {
			t.Errorf("status %d, no %q in:\n%s", status, want, out)
		}
	}
	if status, _, errs := mosimg(t, "node", "show", "77", "--socket", head, "--agent-socket", "/nonexistent"); status != int(fault.NotFound) || !strings.Contains(errs, "77") {
		t.Errorf("an unknown node: status %d, %q", status, errs)
	}
}

func TestNodeActions(t *testing.T) {
	h := new(fakeHead)
	head := h.start(t)
	for _, tt := range []struct {
		args   string
		status int
		text   string
	}{
		{"approve 2", 0, "node 2 (node2, 52:54:00:00:00:02) is approved"},
		{"approve 9 2", int(fault.NotFound), "no machine has this number"},
		{"approve", int(fault.Usage), "no machine is named"},
		{"approve --next 3", int(fault.Usage), "--for"},
		{"approve --next 3 --for 10m", 0, "the next 3 machines"},
		{"approve --next 0 --for 10m", int(fault.Usage), "from 1"},
		{"approve --for 0s", 0, "one by one"},
		{"approve --for 10m 2", int(fault.Usage), "named"},
		{"approve --for soon", int(fault.Usage), "soon"},
		{"deny 2", 0, "is approved"}, // the fake's state
		{"rm 2", 0, "removed"},
		{"rm", int(fault.Usage), "arg"},
		{"rename 2 x", 0, "node 2"},
		{"rename 2", int(fault.Usage), "arg"},
		{"nonsense", int(fault.Usage), "nonsense"},
		{"ls x", int(fault.Usage), "x"},
		{"ls --bad", int(fault.Usage), "--bad"},
	} {
		status, out, errs := mosimg(t, append(append([]string{"node"}, strings.Fields(tt.args)...), "--socket", head)...)
		if status != tt.status || !strings.Contains(out+errs, tt.text) {
			t.Errorf("node %s: status %d, %q; want %d and %q", tt.args, status, out+errs, tt.status, tt.text)
		}
		if tt.status != 0 && !strings.HasPrefix(errs, "mosimg: ") {
			t.Errorf("node %s: stderr %q", tt.args, errs)
		}
	}
	// One unknown machine does not keep the other out.
	var approved []string
	for _, a := range h.acts {
		if a.Action == "approve" {
			approved = append(approved, a.Node)
		}
	}
	if got := strings.Join(approved, " "); got != "2 9 2" {
		t.Errorf("approve was asked for %q; want 2 9 2", got)
	}
	if status, _, errs := mosimg(t, "node", "ls", "--socket", "/nonexistent"); status != int(fault.Unavailable) || !strings.Contains(errs, "not running") {
		t.Errorf("no head: status %d, %q", status, errs)
	}
}

func TestHeadRefusals(t *testing.T) {
	for args, want := range map[string]string{
		"--dhcp maybe":                  "auto, server, proxy or off",
		"--http-port 99999":             "1 to 65535",
		"--adopt -5m":                   "not negative",
		"--config /nonexistent.yaml":    "nonexistent.yaml",
		"--interface none9":             "there is no such interface",
		"extra":                         "extra",
		"--http-port 4660 --dhcp maybe": "2 faults",
	} {
		status, _, errs := mosimg(t, append([]string{"head", "--state", "/nonexistent/state"}, strings.Fields(args)...)...)
		if status != int(fault.Usage) || !strings.Contains(errs, want) {
			t.Errorf("head %s: status %d, %q; want %d and %q", args, status, errs, fault.Usage, want)
		}
	}
}

// drain must not return before the last guest has left: what follows it in an
// operator's script is the power switch.
func TestNodeDrain(t *testing.T) {
	for _, tc := range []struct {
		name   string
		news   []api.Member // one for each look; the last one stays
		flags  string
		status int
		text   string
	}{
		{"guests leave", []api.Member{
			{Liveness: api.Alive, Load: &api.LoadVector{}},
			{Liveness: api.Alive, Load: &api.LoadVector{Guests: 1, Leaving: true}},
			{Liveness: api.Alive, Load: &api.LoadVector{Leaving: true}},
		}, "", 0, "has no guests"},
		{"one stays", []api.Member{{Liveness: api.Alive, Load: &api.LoadVector{Guests: 1, Leaving: true}}}, "--timeout 1500ms", int(fault.Unavailable), "1 guests are left"},
		{"it has not heard", []api.Member{{Liveness: api.Alive}}, "--timeout 1s", int(fault.Unavailable), "has not heard"},
		{"it is dead", []api.Member{{Liveness: api.Dead}}, "", int(fault.Unavailable), "it is dead"},
		{"it is away", nil, "", int(fault.Unavailable), "not a member now"},
		{"nobody waits", nil, "--timeout 0s", 0, "is approved"},
	} {
		h := new(fakeHead)
		mux := http.NewServeMux()
		mux.HandleFunc("GET "+api.PathMembers, func(w http.ResponseWriter, r *http.Request) {
			var table api.MemberTable
			if len(tc.news) > 0 {
				m := tc.news[0]
				m.Node = 2
				table.Members = []api.Member{m}
			}
			if len(tc.news) > 1 {
				tc.news = tc.news[1:]
			}
			unixhttp.Reply(w, table)
		})
		args := append(strings.Fields("node drain 2 "+tc.flags), "--socket", h.start(t), "--agent-socket", listen(t, "agent.sock", mux))
		status, out, errs := mosimg(t, args...)
		if status != tc.status || !strings.Contains(out+errs, tc.text) {
			t.Errorf("%s: status %d, %q, %q; want %d and %q", tc.name, status, out, errs, tc.status, tc.text)
		}
		if len(h.acts) != 1 || h.acts[0] != (api.NodeAct{Action: "drain", Node: "2"}) {
			t.Errorf("%s: the head was asked for %+v", tc.name, h.acts)
		}
	}
}
