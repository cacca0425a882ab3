package netup

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/internal/api"
)

var cards = []link{
	{"eth0", "52:54:00:00:00:01", true, false},
	{"eth1", "52:54:00:00:00:02", true, true},
	{"wlan0", "52:54:00:00:00:03", false, true},
}

func TestMatching(t *testing.T) {
	for _, tc := range []struct {
		want string
		got  string
	}{
		{"", "eth0 eth1"}, // never a radio by itself
		{"52:54:00:00:00:02", "eth1"},
		{"52-54-00-00-00-02", "eth1"},
		{"eth0", "eth0"},
		{"wlan0", "wlan0"},
		{"eth7", ""},
	} {
		var names []string
		for _, l := range matching(cards, tc.want) {
			names = append(names, l.Name)
		}
		if got := strings.Join(names, " "); got != tc.got {
			t.Errorf("matching(%q) = %q; want %q", tc.want, got, tc.got)
		}
	}
}

// The person with the cable in hand reads these.
func TestWhyNoNetwork(t *testing.T) {
	for _, tc := range []struct {
		all, match []link
		want       string
		text       string
	}{
		{cards, cards[:1], "52:54:00:00:00:01", "no carrier on eth0 (52:54:00:00:00:01): check the cable"},
		{cards[:2], nil, "52:54:00:00:00:99", "no network card 52:54:00:00:00:99 here; there is eth0 (52:54:00:00:00:01), eth1 (52:54:00:00:00:02)"},
		{nil, nil, "52:54:00:00:00:99", "no network card 52:54:00:00:00:99 here, nor any other: the image has no driver for it"},
		{nil, nil, "", "no wired network card found: the image has no driver for it"},
	} {
		if got := whyNone(tc.all, tc.match, tc.want); got != tc.text {
			t.Errorf("whyNone = %q; want %q", got, tc.text)
		}
	}
}

func ack(t testing.TB, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	p, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(dhcpv4.MessageTypeAck), dhcpv4.WithYourIP(net.IPv4(10, 77, 0, 9)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 77, 0, 1))),
	}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func seconds(code dhcpv4.OptionCode, d time.Duration) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.Option{Code: code, Value: dhcpv4.Duration(d)})
}

func TestLeaseOf(t *testing.T) {
	life := func(d time.Duration) dhcpv4.Modifier { return seconds(dhcpv4.OptionIPAddressLeaseTime, d) }
	t1 := func(d time.Duration) dhcpv4.Modifier { return seconds(dhcpv4.OptionRenewTimeValue, d) }
	t2 := func(d time.Duration) dhcpv4.Modifier { return seconds(dhcpv4.OptionRebindingTimeValue, d) }
	mask := dhcpv4.WithNetmask(net.CIDRMask(16, 32))
	for _, tc := range []struct {
		name string
		p    *dhcpv4.DHCPv4
		addr string
		gw   net.IP
		r    [3]time.Duration // renew, rebind, expire
	}{
		{"defaults of RFC 2131", ack(t, mask, life(time.Hour)), "10.77.0.9/16", nil, [3]time.Duration{30 * time.Minute, 52*time.Minute + 30*time.Second, time.Hour}},
		{"server's own times", ack(t, mask, life(time.Hour), t1(time.Minute), t2(2*time.Minute)), "10.77.0.9/16", nil, [3]time.Duration{time.Minute, 2 * time.Minute, time.Hour}},
		{"nonsense times", ack(t, mask, life(time.Hour), t1(3*time.Hour), t2(2*time.Hour)), "10.77.0.9/16", nil, [3]time.Duration{26*time.Minute + 15*time.Second, 52*time.Minute + 30*time.Second, time.Hour}},
		{"for ever", ack(t, mask, life(infinite)), "10.77.0.9/16", nil, [3]time.Duration{}},
		{"no time", ack(t, mask), "10.77.0.9/16", nil, [3]time.Duration{}},
		{"too short", ack(t, mask, life(time.Second)), "10.77.0.9/16", nil, [3]time.Duration{4375 * time.Millisecond, 8750 * time.Millisecond, 10 * time.Second}},
		{"no mask", ack(t), "10.77.0.9/8", nil, [3]time.Duration{}},
		{"router", ack(t, mask, dhcpv4.WithRouter(net.IPv4(10, 77, 0, 254))), "10.77.0.9/16", net.IPv4(10, 77, 0, 254), [3]time.Duration{}},
		{"router outside", ack(t, mask, dhcpv4.WithRouter(net.IPv4(192, 168, 0, 1))), "10.77.0.9/16", nil, [3]time.Duration{}},
	} {
		l, err := leaseOf(tc.p)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if got := l.Address.String(); got != tc.addr || !l.Gateway.Equal(tc.gw) {
			t.Errorf("%s: %s by %v; want %s by %v", tc.name, got, l.Gateway, tc.addr, tc.gw)
		}
		if got := [3]time.Duration{l.Renew, l.Rebind, l.Expire}; tc.name != "too short" && got != tc.r {
			t.Errorf("%s: times %v; want %v", tc.name, got, tc.r)
		}
		if l.Expire != 0 && !(0 < l.Renew && l.Renew < l.Rebind && l.Rebind < l.Expire) {
			t.Errorf("%s: times out of order: %v %v %v", tc.name, l.Renew, l.Rebind, l.Expire)
		}
	}
	for _, ip := range []net.IP{net.IPv4zero, net.IPv4(127, 0, 0, 1), net.IPv4(224, 0, 0, 1)} {
		if _, err := leaseOf(ack(t, dhcpv4.WithYourIP(ip))); err == nil {
			t.Errorf("address %v was accepted", ip)
		}
	}
}

func TestLeaseNext(t *testing.T) {
	l := lease{Renew: 30 * time.Minute, Rebind: 52 * time.Minute, Expire: time.Hour}
	for _, tc := range []struct {
		age  time.Duration
		want step
		wait time.Duration
	}{
		{0, keep, 30 * time.Minute},
		{30 * time.Minute, renew, 11 * time.Minute},
		{51*time.Minute + 59*time.Second, renew, time.Second},
		{52 * time.Minute, rebind, 4 * time.Minute},
		{time.Hour, lost, minRetry},
		{100 * time.Hour, lost, minRetry},
	} {
		if got, wait := l.next(tc.age); got != tc.want || wait != tc.wait {
			t.Errorf("next(%v) = %v, %v; want %v, %v", tc.age, got, wait, tc.want, tc.wait)
		}
	}
	if got, _ := (lease{}).next(1000 * time.Hour); got != keep {
		t.Errorf("a lease for ever: next = %v; want keep", got)
	}
}

// Whatever a server sends must neither crash us nor make us ask all the time.
func FuzzLease(f *testing.F) {
	f.Add(ack(f, seconds(dhcpv4.OptionIPAddressLeaseTime, time.Hour)).ToBytes(), int64(5))
	f.Fuzz(func(t *testing.T, b []byte, age int64) {
		p, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		l, err := leaseOf(p)
		if err != nil {
			return
		}
		if _, wait := l.next(time.Duration(age)); wait < time.Second && age >= 0 {
			t.Errorf("lease %+v at age %v: wait %v", l, time.Duration(age), wait)
		}
	})
}

func TestStatusFile(t *testing.T) {
	path := t.TempDir() + "/net.json"
	if st, err := ReadStatus(path); err != nil || st.Up() || st.State != api.StateStarting {
		t.Errorf("before the service has begun: %+v, %v", st, err)
	}
	want := Status{Interface: "eth0", MAC: "52:54:00:00:00:01", Address: "10.77.0.9", Prefix: 24, Reason: "no carrier"}
	if err := want.write(path); err != nil {
		t.Fatal(err)
	}
	got, err := ReadStatus(path)
	if d := cmp.Diff(want, got); err != nil || d != "" || !got.Up() {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
}
