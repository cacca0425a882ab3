package boot

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From include/uapi/linux/input-event-codes.h.
const (
	evKey    = 0x01
	keyPower = 116
)

// inputEventSize is the size of struct input_event: a time of two longs, then
// type, code (16 bits each) and value (32 bits).
const inputEventSize = 2*unsafe.Sizeof(uintptr(0)) + 8

// watchButtons reports a press of a power button (the ACPI one shows up as an
// input device). New devices are looked for every few seconds, because USB
// keyboards have power keys too and come late.
func watchButtons(ctx context.Context, dir string, pressed chan<- struct{}) {
	watched := make(map[string]bool)
	for {
		paths, _ := filepath.Glob(filepath.Join(dir, "event*"))
		for _, p := range paths {
			if watched[p] {
				continue
			}
			watched[p] = true
			if f, err := os.Open(p); err == nil {
				if hasPowerKey(f) {
					go readButton(f, pressed)
				} else {
					f.Close()
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Second):
		}
	}
}

// hasPowerKey asks the device which keys it has (EVIOCGBIT).
func hasPowerKey(f *os.File) bool {
	var bits [96]byte // KEY_CNT is 0x300 bits
	// _IOC(_IOC_READ, 'E', 0x20 + EV_KEY, len)
	req := uintptr(2)<<30 | uintptr(len(bits))<<16 | 'E'<<8 | (0x20 + evKey)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(unsafe.Pointer(&bits[0])))
	return errno == 0 && bits[keyPower/8]&(1<<(keyPower%8)) != 0
}

func readButton(f *os.File, pressed chan<- struct{}) {
	defer f.Close()
	buf := make([]byte, inputEventSize)
	for {
		if n, err := f.Read(buf); err != nil || n != len(buf) {
			return // unplugged
		}
		if isPowerPress(buf) {
			select {
			case pressed <- struct{}{}:
			default:
			}
		}
	}
}

// isPowerPress reports whether an input event is the power key going down.
func isPowerPress(event []byte) bool {
	e := event[len(event)-8:]
	return binary.NativeEndian.Uint16(e) == evKey && binary.NativeEndian.Uint16(e[2:]) == keyPower && binary.NativeEndian.Uint32(e[4:]) == 1
}
