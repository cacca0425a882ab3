package membership

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"mosimg/internal/api"
)

// Which part of TestPartitionHeals a process plays: the test runs itself
// again in a network namespace of its own ("near"), and that one starts the
// other machine in a second namespace ("far"). A cable (veth) joins them.
const roleEnv = "MOSIMG_TEST_PARTITION"

const (
	nearAddr = "10.77.9.1"
	farAddr  = "10.77.9.2"
)

func partitionView() api.ClusterView {
	return api.ClusterView{Name: "c", GossipKeys: [][]byte{key(1)}, Peers: []api.Peer{{Node: 1, Address: nearAddr}, {Node: 2, Address: farAddr}}}
}

func again(t *testing.T, role string, flags uintptr) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestPartitionHeals$", "-test.v=true", "-test.timeout=4m")
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// The cable between two machines is cut until each calls the other dead, and
// joined again: they must find each other without anybody's help.
func TestPartitionHeals(t *testing.T) {
	switch os.Getenv(roleEnv) {
	case "near":
		partitionNear(t)
		return
	case "far":
		partitionFar(t)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if testing.Short() {
		t.Skip("waits for deaths, 15 s")
	}
	t.Parallel()
	if out, err := again(t, "near", syscall.CLONE_NEWNET).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func plug(t *testing.T, name, addr string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	a, err := netlink.ParseAddr(addr + "/24")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	return l
}

func partitionNear(t *testing.T) {
	far := again(t, "far", syscall.CLONE_NEWNET)
	out, err := far.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := far.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { far.Process.Kill(); far.Wait() }()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "near"}, PeerName: "far"}); err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName("far")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetNsPid(peer, far.Process.Pid); err != nil {
		t.Fatal(err)
	}
	cable := plug(t, "near", nearAddr)

	sees := make(chan string, 100) // what the far side sees of us
	go func() {
		for sc := bufio.NewScanner(out); sc.Scan(); {
			if l, ok := strings.CutPrefix(sc.Text(), "sees "); ok {
				sees <- l
			}
		}
		close(sees)
	}()
	last := ""
	farSees := func(want api.Liveness) func() bool {
		return func() bool {
			for {
				select {
				case l := <-sees:
					last = l
					continue
				default:
				}
				return last == string(want)
			}
		}
	}
	g, err := Start(Config{Node: 1, Address: nearAddr, Meta: Meta{Node: 1}}, partitionView())
	if err != nil {
		t.Fatal(err)
	}
	defer g.Stop()
	both := func(l api.Liveness) {
		t.Helper()
		await(t, patience, "near sees far "+string(l), func() bool { return livenessOf(g, 2) == l })
		await(t, patience, "far sees near "+string(l), farSees(l))
	}
	both(api.Alive)
	if err := netlink.LinkSetDown(cable); err != nil {
		t.Fatal(err)
	}
	both(api.Dead)
	if err := netlink.LinkSetUp(cable); err != nil {
		t.Fatal(err)
	}
	both(api.Alive)
}

func partitionFar(t *testing.T) {
	await(t, patience, "the cable", func() bool { _, err := netlink.LinkByName("far"); return err == nil })
	plug(t, "far", farAddr)
	g, err := Start(Config{Node: 2, Address: farAddr, Meta: Meta{Node: 2}}, partitionView())
	if err != nil {
		t.Fatal(err)
	}
	defer g.Stop()
	for last := api.Liveness(""); ; time.Sleep(50 * time.Millisecond) {
		if l := livenessOf(g, 1); l != last {
			last = l
			fmt.Printf("sees %s\n", l)
		}
	}
}
