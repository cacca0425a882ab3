package nodename

import (
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	for name, want := range map[string][2]bool{ // good for a node, for a cluster
		"a": {true, true}, "attic-pc": {true, true}, "node1": {true, true}, strings.Repeat("a", 63): {true, true},
		"7": {false, true}, "3com": {false, true},
		"": {}, "-a": {}, "a-": {}, "A": {}, "a b": {}, "a.b": {}, "ä": {}, "a\n": {}, strings.Repeat("a", 64): {},
	} {
		if got := [2]bool{Check(name) == nil, CheckCluster(name) == nil}; got != want {
			t.Errorf("%q is good for a node, a cluster: %v; want %v", name, got, want)
		}
	}
}
