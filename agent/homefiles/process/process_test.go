package process

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "works":
			Ready(nil)
			time.Sleep(time.Minute)
			os.Exit(0)
		case "fails":
			Ready(errors.New("no such device"))
			os.Exit(1)
		case "tidies":
			signals := make(chan os.Signal, 10)
			signal.Notify(signals, syscall.SIGTERM)
			Ready(nil)
			<-signals
			select {
			case <-signals:
				fmt.Fprint(os.Stderr, "hurried")
			case <-time.After(300 * time.Millisecond):
				fmt.Fprint(os.Stderr, "in order")
			}
			os.Exit(0)
		case "stays":
			signal.Ignore(syscall.SIGTERM)
			Ready(nil)
			time.Sleep(time.Minute)
		case "dies":
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// A process outlives who started it and is known again; a later one with the same
// number is not taken for it.
func TestStartAliveEnd(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	id, err := Start(log, "works")
	if err != nil {
		t.Fatal(err)
	}
	if !id.Alive() {
		t.Error("it does not live")
	}
	if (ID{PID: id.PID, Start: id.Start + 1}).Alive() {
		t.Error("another process of that number is taken for it")
	}
	if !(ID{PID: id.PID, Start: id.Start + 1}).End() || !id.Alive() {
		t.Error("the end of another process was its end")
	}
	if !id.End() || id.Alive() {
		t.Error("it does not end")
	}
	if !id.End() {
		t.Error("to end it again is not nothing")
	}
}

// Whoever ends is let do it in its own time: a second TERM ends our programs at once.
// Whoever does not listen is killed.
func TestEnd(t *testing.T) {
	for verb, says := range map[string]string{"tidies": "in order", "stays": ""} {
		log := filepath.Join(t.TempDir(), "log")
		id, err := Start(log, verb)
		if err != nil {
			t.Fatal(err)
		}
		if !id.End() || id.Alive() {
			t.Errorf("what %s does not end", verb)
		}
		if out, err := os.ReadFile(log); err != nil || string(out) != says {
			t.Errorf("what %s ends, and says %q, %v; want %q", verb, out, err, says)
		}
	}
}

func TestStartFails(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	for verb, want := range map[string]string{"fails": "no such device", "dies": "died at once"} {
		if _, err := Start(log, verb); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Start(%s) = %v; want %q", verb, err, want)
		}
	}
}

func TestParseStat(t *testing.T) {
	tail := strings.Repeat(" 0", 18) + " 4711 0"
	for stat, want := range map[string]uint64{
		"1 (a) S" + tail: 4711, "1 (a) b) S" + tail: 4711, "1 (a) Z" + tail: 0, "": 0, "1 (a": 0,
	} {
		if got, err := parseStat(stat); got != want || (err == nil) != (want != 0) {
			t.Errorf("parseStat(%q) = %d, %v; want %d", stat, got, err, want)
		}
	}
}
