// Package monitor shows the machines of a cluster as bars: a column for each in a
// terminal, as MOSIX's mon did, or a line for each on a node's console. It
// is pure: what the agent told, what the user chose and the size of the screen
// go in, lines of text come out. Terminals and agents are the callers' business.
package monitor

import (
	"fmt"
	"math"

	"mosimg/internal/api"
)

// ReferenceSpeed is that of the CPU by which loads are told, see api.LoadVector.
const ReferenceSpeed = 10000

// alive reports whether a machine's last news are of a machine that runs.
func alive(m api.Member) bool { return m.Liveness == api.Alive || m.Liveness == api.Suspect }

// news is what is known of a machine's load now, nil for nothing: what a dead
// machine last said of its load is not its load.
func news(m api.Member) *api.LoadVector {
	if !alive(m) {
		return nil
	}
	return m.Load
}

// State is a machine's condition in a word: alive, suspect, dead, left, blocked or
// leaving.
func State(m api.Member) string {
	if v := m.Load; v != nil && m.Liveness == api.Alive {
		switch {
		case v.Leaving:
			return "leaving"
		case v.Blocked:
			return "blocked"
		}
	}
	return string(m.Liveness)
}

// relativeLoad is the load of one CPU in MOSIX's unit: 1 is what keeps
// a CPU of ReferenceSpeed busy. A CPU whose speed is not known yet counts as such a one.
func relativeLoad(v *api.LoadVector) float64 {
	speed := v.Speed
	if speed <= 0 {
		speed = ReferenceSpeed
	}
	return v.Load / float64(max(1, v.CPUs)) * ReferenceSpeed / float64(speed)
}

// memoryUsed is the used share of a machine's memory, 0..1.
func memoryUsed(v *api.LoadVector) float64 {
	if v.MemTotal <= 0 {
		return 0
	}
	return share(1 - float64(v.MemFree)/float64(v.MemTotal))
}

// share makes of any number one that can be drawn as a part of a whole.
func share(x float64) float64 {
	if math.IsNaN(x) {
		return 0
	}
	return min(max(x, 0), 1)
}

// roundUp is the smallest of 1, 2 and 5 times a power of ten that is no less
// than x: the end of a scale.
func roundUp(x float64) float64 {
	if !(x > 0) || math.IsInf(x, 0) {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(x)))
	for _, step := range []float64{1, 2, 5} {
		if x <= step*power*(1+1e-9) {
			return step * power
		}
	}
	return 10 * power
}

// number is a value of a scale in five characters or fewer.
func number(x float64) string {
	switch {
	case x >= 99999.5:
		return fmt.Sprintf("%.0e", x)
	case x >= 10 || x == math.Trunc(x):
		return fmt.Sprintf("%.0f", x)
	}
	return fmt.Sprintf("%.2f", x)
}
