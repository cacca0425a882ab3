package netup

import (
	"errors"
	"net"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// lease is what a DHCP server granted, with its times counted from when the
// request was sent.
type lease struct {
	Address net.IPNet // the address, with the subnet's mask
	Gateway net.IP    // nil when there is none
	Server  net.IP
	Renew   time.Duration // T1
	Rebind  time.Duration // T2
	Expire  time.Duration // 0: never
}

// infinite is the lease time that means "for ever" (RFC 2131 section 3.3).
const infinite = 0xffffffff * time.Second

// minLease keeps a server with a silly lease time from making us ask all the time.
const minLease = 10 * time.Second

// leaseOf reads a server's ACK.
func leaseOf(ack *dhcpv4.DHCPv4) (lease, error) {
	addr := ack.YourIPAddr.To4()
	if addr == nil || addr.IsUnspecified() || addr.IsLoopback() || addr.IsMulticast() {
		return lease{}, errors.New("the DHCP server granted no usable address")
	}
	mask := ack.SubnetMask()
	if ones, bits := mask.Size(); bits != 32 || ones == 0 {
		mask = addr.DefaultMask()
	}
	l := lease{Address: net.IPNet{IP: addr, Mask: mask}, Server: ack.ServerIdentifier()}
	if r := ack.Router(); len(r) > 0 && l.Address.Contains(r[0]) {
		l.Gateway = r[0].To4()
	}
	life := ack.IPAddressLeaseTime(infinite)
	if life >= infinite {
		return l, nil
	}
	life = max(life, minLease)
	// Defaults of RFC 2131 section 4.4.5; nonsense from the server falls back to them.
	l.Expire = life
	l.Rebind = ack.IPAddressRebindingTime(life * 7 / 8)
	if l.Rebind <= 0 || l.Rebind >= life {
		l.Rebind = life * 7 / 8
	}
	l.Renew = ack.IPAddressRenewalTime(life / 2)
	if l.Renew <= 0 || l.Renew >= l.Rebind {
		l.Renew = min(life/2, l.Rebind/2)
	}
	return l, nil
}

// step is what a lease's holder has to do next.
type step int

const (
	keep   step = iota
	renew       // ask the server that granted it
	rebind      // ask any server
	lost        // it has expired: begin anew
)

// minRetry is the shortest pause between two attempts to extend a lease. RFC
// 2131 says a minute; leases of a small cluster may be shorter than that.
const minRetry = 5 * time.Second

// next says what to do with a lease of this age, and how long to wait until
// asking again. Between attempts it waits half of what remains (RFC 2131
// section 4.4.5).
func (l lease) next(age time.Duration) (step, time.Duration) {
	switch {
	case l.Expire == 0:
		return keep, 24 * time.Hour
	case age < l.Renew:
		return keep, l.Renew - age
	case age < l.Rebind:
		return renew, min(max((l.Rebind-age)/2, minRetry), max(l.Rebind-age, time.Second))
	case age < l.Expire:
		return rebind, min(max((l.Expire-age)/2, minRetry), max(l.Expire-age, time.Second))
	}
	return lost, minRetry
}
