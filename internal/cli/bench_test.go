package cli

import "testing"

func TestRowIsTheMedianOfPairs(t *testing.T) {
	p := &pairs{name: "x", unit: "s", peerName: "y"}
	// One pair was disturbed: both sides took ten times as long.
	p.add(1, 2)
	p.add(10, 20)
	p.add(1.2, 2)
	r := p.row()
	if r.Ours != 1.2 || r.Peer != 2 || r.Ratio != 0.5 {
		t.Errorf("row = %+v; want ours 1.2, peer 2, ratio 0.5", r)
	}
	if m := median([]float64{4, 1, 3, 2}); m != 2.5 {
		t.Errorf("median of an even number = %v; want 2.5", m)
	}
}
