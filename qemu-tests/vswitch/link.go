package vswitch

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Link is the cable between a machine and the switch; it works the same in
// both directions. The zero value is a perfect one.
type Link struct {
	Bandwidth int64         // bits a second, 0 is unlimited
	Delay     time.Duration // each way
	Loss      float64       // 0..1, of frames, each way
}

// ParseLink reads "100mbit", or with more words "10mbit,delay=5ms,loss=1%".
// Speeds are 10mbit, 100mbit, 1gbit, any number of kbit, mbit or gbit, and
// unlimited. "" is unlimited.
func ParseLink(s string) (Link, error) {
	var l Link
	for i, word := range strings.Split(s, ",") {
		key, value, isOption := strings.Cut(strings.TrimSpace(word), "=")
		var err error
		switch {
		case i == 0 && !isOption:
			l.Bandwidth, err = parseSpeed(key)
		case key == "delay":
			l.Delay, err = time.ParseDuration(value)
			if err == nil && (l.Delay < 0 || l.Delay > time.Minute) {
				err = fmt.Errorf("delay %s is not within 0 and 1m", value)
			}
		case key == "loss":
			l.Loss, err = parsePercent(value)
		default:
			err = fmt.Errorf("no option %q", word)
		}
		if err != nil {
			return Link{}, fmt.Errorf("link %q: %w; want SPEED[,delay=TIME][,loss=PERCENT%%], as in 10mbit, 100mbit, 1gbit, 100mbit,delay=5ms,loss=1%%", s, err)
		}
	}
	return l, nil
}

func parseSpeed(s string) (int64, error) {
	if s == "" || s == "unlimited" {
		return 0, nil
	}
	for unit, factor := range map[string]float64{"kbit": 1e3, "mbit": 1e6, "gbit": 1e9} {
		if number, ok := strings.CutSuffix(s, unit); ok {
			n, err := strconv.ParseFloat(number, 64)
			if err != nil || !(n*factor >= 1e3 && n*factor <= 1e12) {
				return 0, fmt.Errorf("speed %q is not within 1kbit and 1000gbit", s)
			}
			return int64(math.Round(n * factor)), nil
		}
	}
	return 0, fmt.Errorf("speed %q has no unit kbit, mbit or gbit", s)
}

func parsePercent(s string) (float64, error) {
	number, ok := strings.CutSuffix(s, "%")
	n, err := strconv.ParseFloat(number, 64)
	if !ok || err != nil || !(n >= 0 && n <= 100) {
		return 0, fmt.Errorf("loss %q is not within 0%% and 100%%", s)
	}
	return n / 100, nil
}

// String is the link as ParseLink reads it.
func (l Link) String() string {
	speed := "unlimited"
	if b := l.Bandwidth; b > 0 {
		switch {
		case b%1e9 == 0:
			speed = fmt.Sprintf("%dgbit", b/1e9)
		case b%1e6 == 0:
			speed = fmt.Sprintf("%dmbit", b/1e6)
		default:
			speed = strconv.FormatFloat(float64(b)/1e3, 'f', -1, 64) + "kbit"
		}
	}
	if l.Delay > 0 {
		speed += ",delay=" + l.Delay.String()
	}
	if l.Loss > 0 {
		speed += ",loss=" + strconv.FormatFloat(l.Loss*100, 'g', -1, 64) + "%"
	}
	return speed
}

const (
	// What a frame takes on a copper wire beyond its bytes: preamble 8,
	// checksum 4, gap 12; and the shortest is 60 (IEEE 802.3 clause 4.4.2).
	wireOverhead = 24
	wireMin      = 60
	// switchBuffer is how much a port of the switch queues before it drops:
	// the shared packet buffer of a cheap gigabit desktop switch.
	switchBuffer = 512 << 10
	// senderBuffer is how much a machine may be ahead of its wire before it
	// has to wait, as a network card's ring makes it.
	senderBuffer = 32 << 10
)

// shaper computes when frames come out of one direction of a link. It has no
// clock: times go in and out.
type shaper struct {
	Link
	busyUntil time.Time // when the wire is free
}

// wireTime is how long n bytes of frame occupy the wire.
func (s *shaper) wireTime(n int) time.Duration {
	if s.Bandwidth == 0 {
		return 0
	}
	bits := float64(max(n, wireMin)+wireOverhead) * 8
	return time.Duration(bits / float64(s.Bandwidth) * float64(time.Second))
}

// backlog is how many bytes wait for the wire.
func (s *shaper) backlog(now time.Time) int64 {
	if d := s.busyUntil.Sub(now); d > 0 {
		return int64(d.Seconds() * float64(s.Bandwidth) / 8)
	}
	return 0
}

// pass puts a frame of n bytes on the wire and returns when it arrives.
func (s *shaper) pass(now time.Time, n int) time.Time {
	if s.busyUntil.Before(now) {
		s.busyUntil = now
	}
	s.busyUntil = s.busyUntil.Add(s.wireTime(n))
	return s.busyUntil.Add(s.Delay)
}

// full reports whether a queue of limit bytes has no room for another frame.
func (s *shaper) full(now time.Time, limit int64) bool {
	return s.Bandwidth > 0 && s.backlog(now) > limit
}

// room is how long a sender waits until at most limit bytes are queued.
func (s *shaper) room(now time.Time, limit int64) time.Duration {
	over := s.backlog(now) - limit
	if s.Bandwidth == 0 || over <= 0 {
		return 0
	}
	return time.Duration(float64(over*8) / float64(s.Bandwidth) * float64(time.Second))
}
