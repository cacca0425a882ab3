package nodecli

import (
	"encoding/json"
	"strings"
	"testing"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

func TestMosctlAsks(t *testing.T) {
	socket := agentSocket(t)
	for _, tc := range []struct{ args, want string }{
		{"whois", "1 head \n"},
		{"whois 2", "2 node2 10.77.0.128\n"},
		{"whois node2", "2 node2 10.77.0.128\n"},
		{"whois 10.77.0.128", "2 node2 10.77.0.128\n"},
		{"getload", "0.00\n"},
		{"getload node2", "8.00\n"},
		{"status 2", "node 2, node2, 10.77.0.128: alive\n  guests   0; takes them\n  moves    jobs can move to it and from it\n" +
			"  load     8.00 on 4 CPUs of speed not measured yet, 100% used\n  memory   3.0G of 4.0G used\n  news     1.2s old\n"},
		{"status 3", "node 3, node3, : dead\n"},
	} {
		status, out, errs := run(t, append(append([]string{"mosctl"}, strings.Fields(tc.args)...), "--socket", socket)...)
		if status != 0 || errs != "" || out != tc.want {
			t.Errorf("mosctl %s: %d, %q, %q; want %q", tc.args, status, errs, out, tc.want)
		}
	}
	status, out, errs := run(t, "mosctl", "status", "2", "--json", "--socket", socket)
	var m api.Member
	if err := json.Unmarshal([]byte(out), &m); status != 0 || errs != "" || err != nil || m.Node != 2 {
		t.Errorf("--json: %d, %q, %v, %+v", status, errs, err, m)
	}
}

// Each refusal is one line that says what is wrong.
func TestMosctlRefuses(t *testing.T) {
	socket := agentSocket(t)
	for _, tc := range []struct {
		args string
		kind fault.Kind
		text string
	}{
		{"whois node9", fault.NotFound, `node "node9": it is not a member`},
		{"whois -- -2", fault.NotFound, `node "-2"`},
		{"status 0", fault.NotFound, `node "0"`},
		{"getload 10.77.0.1", fault.NotFound, "mosmon lists the members"},
		{"getload 3", fault.Unavailable, "the node is dead"},
		{"getload küche", fault.Unavailable, "nobody has heard of it"},
	} {
		verb, rest, _ := strings.Cut(tc.args, " ")
		args := append([]string{"mosctl", verb, "--socket", socket}, strings.Fields(rest)...)
		status, out, errs := run(t, args...)
		if status != int(tc.kind) || out != "" || !strings.Contains(errs, tc.text) || strings.Count(errs, "\n") != 1 {
			t.Errorf("mosctl %s: %d, %q, %q; want %d and one line with %q", tc.args, status, out, errs, tc.kind, tc.text)
		}
	}
	if _, err := member(api.MemberTable{}, nil); fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "not a member") {
		t.Errorf("on a machine that is no member: %v", err)
	}
	if text, err := nodeStatus(api.Member{Node: 4, Name: "a\x1b[2J", Liveness: api.Alive, Load: &api.LoadVector{Leaving: true, Speed: 9000}}); err != nil || strings.Contains(text, "\x1b") || !strings.Contains(text, "leaving") || !strings.Contains(text, "9000") {
		t.Errorf("status of a leaving node: %q, %v", text, err)
	}
}
