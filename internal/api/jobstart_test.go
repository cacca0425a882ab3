package api

import (
	"bytes"
	"encoding/json"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A file that was named in another encoding must be found by the job too.
func TestJobStartKeepsBytes(t *testing.T) {
	want := JobStart{
		Token: "00ff", Argv: []string{"cat", "caf\xe9", "", "\x01<&>\u2028"}, Env: []string{"A=\xff\xfe", "B="}, Dir: "/tmp/\xe9",
		Umask: 0o27, Nice: -5, Ignored: []int{1, 2}, Groups: []uint32{4, 27},
		Limits: []JobLimit{{Resource: 7, Cur: 1024, Max: math.MaxUint64}}, Node: "node3", Locked: true, NoStdin: true,
	}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got JobStart
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", b, d)
	}
	if p, err := json.Marshal(&want); err != nil || !bytes.Equal(p, b) {
		t.Errorf("a pointer gives %s, %v; want %s", p, err, b)
	}
}
