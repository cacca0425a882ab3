// Package netup brings up the network of a machine that we own: it finds the
// card that booted, waits for carrier, gets an address by DHCP (or sets a
// static one on a head) and keeps it. It runs as a process of its own, so
// that process 1 reads nothing from the network, and tells the agent by a
// small file how far it is.
package netup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Config says which card to use and how.
type Config struct {
	// Card is the name or MAC of the card; "" tries all wired ones.
	Card string
	// Address is a static address with its prefix ("10.77.0.1/24"); "" means DHCP.
	Address string
	// StatusFile is where the Status is written.
	StatusFile string
	Log        *slog.Logger // nil: silent
}

const (
	// poll is how often carrier is looked at. Each look is a few reads in
	// sysfs; a person who plugs in a cable must not wait.
	poll = 250 * time.Millisecond
	// cardWait is how long we wait for the card that booted before we try
	// the others: USB cards take seconds to appear.
	cardWait = 15 * time.Second
	// linkWait is how long a link may take to come up before its cable is
	// doubted: autonegotiation takes a second or three.
	linkWait = 4 * time.Second
	// remind is how often a lack that lasts is said again.
	remind = time.Minute
)

type service struct {
	Config
	last   Status
	lastAt time.Time
}

// Run brings the network up and keeps it up until ctx ends. It returns an
// error only for a wrong Config or when the kernel refuses to be asked.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &service{Config: cfg}
	if cfg.Address != "" {
		ip, subnet, err := net.ParseCIDR(cfg.Address)
		if err != nil || ip.To4() == nil {
			return fault.New(fault.Usage, "read address", cfg.Address, "not an IPv4 address with a prefix", "e.g. mosimg.address=10.77.0.1/24")
		}
		return s.static(ctx, net.IPNet{IP: ip.To4(), Mask: subnet.Mask})
	}
	for {
		links, err := s.awaitCarrier(ctx)
		if err != nil {
			return err
		}
		name, ack, err := s.race(ctx, links)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			s.tell(Status{State: api.StateNoLease, Reason: err.Error(), Interface: links[0].Name, MAC: links[0].MAC})
			continue
		}
		if err := s.hold(ctx, name, ack); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// tell writes the status file and the log when something changed, and the
// log again from time to time while something is missing.
func (s *service) tell(st Status) {
	changed := st != s.last
	if changed || (st.Reason != "" && time.Since(s.lastAt) >= remind) {
		level := slog.LevelInfo
		if st.Reason != "" {
			level = slog.LevelWarn
		}
		s.Log.Log(context.Background(), level, st.String())
		s.lastAt = time.Now()
	}
	if !changed {
		return
	}
	s.last = st
	if s.StatusFile == "" {
		return
	}
	if err := st.write(s.StatusFile); err != nil {
		s.Log.Error("the agent cannot be told", "why", err)
	}
}

// awaitCarrier brings up the cards we may use and waits until at least one
// has carrier.
func (s *service) awaitCarrier(ctx context.Context) ([]link, error) {
	began := time.Now()
	tried := began // when the last card was brought up
	want := s.Card
	upped := make(map[string]bool)
	for {
		all, err := readLinks(sysNet)
		if err != nil {
			return nil, fault.New(fault.Environment, "list", "network cards", err, "")
		}
		match := matching(all, want)
		if want != "" && len(match) == 0 && time.Since(began) > cardWait && len(matching(all, "")) > 0 {
			s.Log.Warn(whyNone(all, nil, want) + "; trying all wired cards")
			want = ""
			continue
		}
		for _, l := range match {
			if !upped[l.Name] {
				upped[l.Name], tried = true, time.Now()
				if err := setUp(l.Name); err != nil {
					s.Log.Warn("card cannot be brought up", "card", l.String(), "why", err)
				}
			}
		}
		if up := withCarrier(match); len(up) > 0 {
			return up, nil
		}
		if time.Since(tried) > linkWait {
			st := Status{State: api.StateNoLink, Reason: whyNone(all, match, want)}
			if len(match) > 0 {
				st.Interface, st.MAC = match[0].Name, match[0].MAC
			}
			s.tell(st)
		}
		if !sleep(ctx, poll) {
			return nil, ctx.Err()
		}
	}
}

// race asks for an address on all links at once; the first answer wins.
func (s *service) race(ctx context.Context, links []link) (string, *dhcpv4.DHCPv4, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		name string
		ack  *dhcpv4.DHCPv4
		err  error
	}
	results := make(chan result, len(links))
	for _, l := range links {
		go func() {
			ack, err := acquire(ctx, l.Name)
			results <- result{l.Name, ack, err}
		}()
	}
	var errs []error
	for range links {
		r := <-results
		if r.err == nil {
			return r.name, r.ack, nil
		}
		errs = append(errs, r.err)
	}
	return "", nil, errors.Join(errs...)
}

// hold configures a lease and extends it for as long as possible. It returns
// nil when the lease is lost and a new one has to be looked for.
//
// An address whose lease ran out is kept until a server grants another one or
// says no (systemd-networkd calls it KeepConfiguration=dhcp): when the head
// is down for long, its nodes must not cut their own connections.
func (s *service) hold(ctx context.Context, name string, ack *dhcpv4.DHCPv4) error {
	l, err := leaseOf(ack)
	if err != nil {
		s.Log.Warn("lease refused", "card", name, "why", err)
		sleep(ctx, minRetry)
		return nil
	}
	if err := configure(name, l.Address, l.Gateway); err != nil {
		return fault.New(fault.Environment, "configure", name, err, "")
	}
	st := s.statusOf(name, l)
	s.tell(st)
	began := time.Now() // of the lease
	var asked time.Time // when we last tried to extend it
	var pause time.Duration
	for carrier := true; sleep(ctx, poll); {
		if _, now := Wired(name); now != carrier {
			carrier = now
			st.Reason = ""
			if !carrier {
				st.Reason = fmt.Sprintf("no carrier on %s (%s): check the cable", st.Interface, st.MAC)
			} else if age := time.Since(began); l.Expire > 0 && age < l.Renew {
				// Another switch may mean another network: ask now.
				began = began.Add(age - l.Renew)
			}
			s.tell(st)
		}
		todo, next := l.next(time.Since(began))
		if todo == keep || !carrier || time.Since(asked) < pause {
			continue
		}
		asked, pause = time.Now(), next
		fresh, err := s.again(ctx, todo, name, ack)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			st.Reason = err.Error()
			s.tell(st)
			if errors.Is(err, errNak) {
				return nil
			}
			continue
		}
		granted, err := leaseOf(fresh)
		if err != nil || granted.Address.String() != l.Address.String() {
			return nil // another address: begin anew
		}
		ack, l, began, pause = fresh, granted, asked, 0
		st = s.statusOf(name, l)
		s.tell(st)
	}
	return nil
}

func (s *service) again(ctx context.Context, todo step, name string, ack *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error) {
	if todo == lost {
		return acquire(ctx, name)
	}
	return extend(ctx, name, ack, todo == rebind)
}

func (s *service) statusOf(name string, l lease) Status {
	ones, _ := l.Address.Mask.Size()
	st := Status{Interface: name, MAC: macOf(name), Address: l.Address.IP.String(), Prefix: ones}
	if l.Gateway != nil {
		st.Gateway = l.Gateway.String()
	}
	return st
}

// static sets a fixed address and then only watches carrier. Without a card
// named it takes the first one that has carrier.
func (s *service) static(ctx context.Context, addr net.IPNet) error {
	var l link
	for l.Name == "" {
		all, err := readLinks(sysNet)
		if err != nil {
			return fault.New(fault.Environment, "list", "network cards", err, "")
		}
		if match := matching(all, s.Card); s.Card != "" && len(match) > 0 {
			l = match[0] // carrier or not: a head may start before its switch
			break
		}
		up, err := s.awaitCarrier(ctx)
		if err != nil {
			return err
		}
		l = up[0]
	}
	if err := setUp(l.Name); err != nil {
		return fault.New(fault.Environment, "bring up", l.Name, err, "")
	}
	if err := configure(l.Name, addr, nil); err != nil {
		return fault.New(fault.Environment, "configure", l.Name, err, "")
	}
	ones, _ := addr.Mask.Size()
	st := Status{Interface: l.Name, MAC: l.MAC, Address: addr.IP.String(), Prefix: ones}
	began := time.Now()
	for {
		st.Reason = ""
		if _, carrier := Wired(l.Name); !carrier && time.Since(began) > linkWait {
			st.Reason = whyNone(nil, []link{l}, "")
		}
		s.tell(st)
		if !sleep(ctx, poll) {
			return nil
		}
	}
}

func setUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// configure makes addr the only IPv4 address of the link that we did set,
// and gw (may be nil) the default route.
func configure(name string, addr net.IPNet, gw net.IP) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	want := &netlink.Addr{IPNet: &addr}
	old, err := netlink.AddrList(l, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	// Old ones go first: with the first address of a subnet the kernel
	// removes all others of it.
	for _, a := range old {
		if a.IPNet.String() != addr.String() {
			if err := netlink.AddrDel(l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("remove old address %s: %w", a.IPNet, err)
			}
		}
	}
	if err := netlink.AddrReplace(l, want); err != nil {
		return fmt.Errorf("set address %s: %w", addr.String(), err)
	}
	if gw == nil {
		return nil
	}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gw}); err != nil {
		return fmt.Errorf("set default route by %s: %w", gw, err)
	}
	return nil
}

func macOf(name string) string {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return ""
	}
	return i.HardwareAddr.String()
}

// sleep waits for d and reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
