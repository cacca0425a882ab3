package boot

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"mosimg/agent/console"
	"mosimg/agent/netup"
)

// headArgv is the head's command line, once the network is up.
func headArgv() ([]string, error) {
	if !exists(headTool) {
		return nil, fmt.Errorf("%s is not here: mosimg.role=head needs the head archive as second initrd", headTool)
	}
	st, err := netup.ReadStatus(netup.StatusFile)
	if err != nil {
		return nil, err
	}
	if !st.Up() {
		return nil, errors.New("waiting for the network")
	}
	argv := []string{headTool, "head", "--interface", st.Interface, "--images", headImages, "--state", StateDir}
	if exists(headConfig) {
		argv = append(argv, "--config", headConfig)
	}
	return argv, nil
}

// debugServices are the ways in that exist only with mosimg.debug: a root
// shell on each console, and the lab's port when this is a lab machine.
func (m *machine) debugServices() []*service {
	var list []*service
	shell := firstOf("/bin/sh", "/bbin/gosh")
	for _, dev := range console.Active() {
		if dev == "/dev/tty0" { // "the one in front" cannot be a controlling terminal
			dev = "/dev/tty1"
		}
		list = append(list, &service{
			name: "shell on " + dev,
			tty:  dev,
			argv: func() ([]string, error) {
				if shell == "" {
					return nil, errors.New("this image has no shell")
				}
				return []string{shell}, nil
			},
		})
	}
	return append(list, &service{
		name: "labport",
		argv: func() ([]string, error) { return []string{self, "labport"}, nil },
	})
}

func loUp() error {
	l, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}
