package pxe

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"mosimg/internal/fault"
	"mosimg/pxe/decision"
	"mosimg/pxe/dhcpd"
)

// chooseModes decides for each network who leases its addresses. In mode auto
// it asks all networks at once.
func (h *Head) chooseModes(ctx context.Context) error {
	if h.cfg.DHCP == DHCPProxy {
		for _, n := range h.nets {
			n.proxy.Store(true)
		}
	}
	if h.cfg.DHCP != DHCPAuto {
		return nil
	}
	errs := make([]error, len(h.nets))
	var wg sync.WaitGroup
	for i, n := range h.nets {
		wg.Go(func() {
			peer, found, err := dhcpd.Probe(ctx, n.Name, n.addr())
			if err != nil {
				errs[i] = fault.New(fault.Environment, "start DHCP on", n.Name, err, "--dhcp server and --dhcp proxy do not look")
			}
			if found {
				n.proxy.Store(true)
				h.cfg.Log.Info("another DHCP server gives out addresses here: the head only adds what to boot (proxy mode)",
					"interface", n.Name, "server", peer.Address, "offered", peer.Offers)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var l fault.List
	for _, err := range errs {
		l.Add(err)
	}
	return l.All("start head", "")
}

// hintPause is the least time between two looks that clients' requests cause:
// anyone can send one.
const hintPause = 10 * time.Second

// watchRivals looks for another DHCP server on a network every few minutes, and
// at once when a client was heard to take another one's offer. When there is
// one the head steps down: two servers with pools of their own give one address
// to two machines sooner or later. It never steps up again by itself, since a
// router that is being restarted is not gone.
func (h *Head) watchRivals(ctx context.Context, n *network) error {
	tick := time.NewTicker(h.cfg.Reprobe)
	defer tick.Stop()
	var hint netip.Addr // who a client preferred, if that is why we look
	var last time.Time
	silent := 0 // looks in a row that found nobody
	told := map[netip.Addr]bool{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			hint = netip.Addr{}
		case hint = <-n.rivals:
			if n.mode() == decision.Proxy || time.Since(last) < hintPause {
				continue
			}
		}
		last = time.Now()
		peer, found, err := dhcpd.Probe(ctx, n.Name, n.addr())
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			n.log.Warn("no look for other DHCP servers", "interface", n.Name, "error", err.Error())
			continue
		case found:
			silent = 0
		default:
			silent++
		}
		switch proxy := n.mode() == decision.Proxy; {
		case found && !proxy:
			n.proxy.Store(true)
			n.log.Error("ANOTHER DHCP SERVER APPEARED: the head gives out no new addresses any more and only adds what to boot (proxy mode)",
				"interface", n.Name, "server", peer.Address, "offered", peer.Offers,
				"hint", "stop that server and restart the head, or start the head with --dhcp server to give out addresses all the same")
		case !found && proxy && silent == 2:
			n.log.Warn("the other DHCP server does not answer any more: machines get no address",
				"interface", n.Name, "hint", "start that server again, or restart the head if it is gone for good")
		case !found && !proxy && hint.IsValid() && !told[hint] && len(told) < 16:
			told[hint] = true
			n.log.Warn("another DHCP server serves some machines here, but offers this one nothing",
				"interface", n.Name, "server", hint, "hint", "make sure that its addresses are outside the pool of this head")
		}
	}
}
