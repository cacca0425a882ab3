package pxe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/pxe/admin"
	"mosimg/pxe/dhcpd"
	"mosimg/pxe/httpd"
	"mosimg/pxe/radv"
	"mosimg/pxe/tftpd"
)

// stopGrace is how long a stop waits for downloads and requests to end.
const stopGrace = 3 * time.Second

// service is one bound part of the head.
type service struct {
	name  string
	conn  io.Closer // its socket; nil for none
	serve func(context.Context) error
}

type services []service

// close gives back all sockets of services that were not run.
func (s services) close() {
	for _, x := range s {
		if x.conn != nil {
			x.conn.Close()
		}
	}
}

// run serves until ctx ends or one of them fails, and then stops all.
func (s services) run(ctx context.Context, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	errs := make([]error, len(s))
	for i, x := range s {
		wg.Go(func() {
			defer cancel()
			if err := x.serve(ctx); err != nil && ctx.Err() == nil {
				errs[i] = fault.New(fault.Environment, "serve", x.name, err, "")
			}
		})
	}
	<-ctx.Done()
	log.Info("stopping")
	wg.Wait()
	return errors.Join(errs...)
}

// bind opens every socket of the head, or none.
func (h *Head) bind(ctx context.Context) (s services, err error) {
	defer func() {
		if err != nil {
			s.close()
			s = nil
		}
	}()
	s = append(s, service{"membership", nil, h.enrol.Run})
	boot := &httpd.Server{Images: h.images, Script: h.script, MAC: h.macOf, Log: h.cfg.Log}
	bad := func(what string, err error) (services, error) {
		return s, fault.New(fault.Environment, "bind", what, err, "")
	}
	for _, n := range h.nets {
		if n.Warning != "" {
			h.cfg.Log.Warn(n.Warning)
		}
		if n.dhcp != nil {
			more, err := h.bindDHCP(ctx, n)
			s = append(s, more...)
			if err != nil {
				return bad("DHCP on "+n.Name, err)
			}
		}
		addr := func(port int) string { return fmt.Sprintf("%s:%d", n.addr(), port) }
		// Only the served addresses are bound, so that no other network of
		// this machine sees the head.
		udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.addr(), uint16(h.cfg.TFTPPort))))
		if err != nil {
			return bad("TFTP on "+n.Name, err)
		}
		tftp := &tftpd.Server{Loader: h.images.Loader, MAC: h.macOf, MTU: n.MTU, Ports: h.cfg.tftpPorts, Log: h.cfg.Log}
		s = append(s, service{"TFTP on " + n.Name, udp, func(ctx context.Context) error { return tftp.Serve(ctx, udp) }})

		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp4", addr(h.cfg.HTTPPort))
		if err != nil {
			return bad("HTTP on "+n.Name, err)
		}
		s = append(s, httpService("HTTP on "+n.Name, l, boot.NewHTTPServer))

		l, err = lc.Listen(ctx, "tcp4", addr(h.cfg.APIPort))
		if err != nil {
			return bad("head API on "+n.Name, err)
		}
		s = append(s, httpService("head API on "+n.Name, l, h.enrol.NewHTTPServer))
	}
	l, err := admin.Listen(ctx, filepath.Join(h.cfg.Run, filepath.Base(api.HeadSocket)))
	if err != nil {
		return s, err
	}
	return append(s, httpService("admin API", l, func(ctx context.Context) *http.Server {
		return admin.NewHTTPServer(ctx, h.enrol, h.cfg.Log)
	})), nil
}

// bootPort is PXE's boot server port (PXE 2.1 section 2.2.3).
const bootPort = 4011

// bindDHCP opens what belongs to DHCP on one network.
func (h *Head) bindDHCP(ctx context.Context, n *network) (s services, err error) {
	srv := &dhcpd.Server{Handler: n.dhcp}
	conn, err := dhcpd.Listen(ctx, n.Name, h.cfg.DHCPPort)
	if err != nil {
		return s, err
	}
	s = append(s, service{"DHCP on " + n.Name, conn, func(ctx context.Context) error { return srv.Serve(ctx, conn) }})
	boot, err := dhcpd.Listen(ctx, n.Name, bootPort)
	if err != nil {
		return s, fmt.Errorf("port %d: %w", bootPort, err)
	}
	s = append(s, service{"PXE boot server on " + n.Name, boot, func(ctx context.Context) error { return srv.ServeBoot(ctx, boot) }})
	arp, err := dhcpd.ListenARP(n.Name)
	if err != nil {
		return s, fmt.Errorf("ARP: %w", err)
	}
	n.dhcp.InUse = arp.InUse
	s = append(s, service{"ARP on " + n.Name, arp, arp.Serve})
	if h.cfg.DHCP == DHCPAuto {
		s = append(s, service{"look for other DHCP servers on " + n.Name, nil, func(ctx context.Context) error { return h.watchRivals(ctx, n) }})
	}
	return append(s, h.routerAdvertiser(ctx, n)...), nil
}

// routerAdvertiser spares iPXE its wait for an IPv6 router. Where IPv6 is off
// there is none; machines then boot all the same, only later.
func (h *Head) routerAdvertiser(ctx context.Context, n *network) services {
	conn, err := radv.Listen(ctx, n.Name)
	if err != nil {
		h.cfg.Log.Info("router solicitations are not answered: iPXE will wait 16 s for each machine", "interface", n.Name, "error", err.Error())
		return nil
	}
	srv := &radv.Server{Log: h.cfg.Log, Known: n.boots}
	return services{{"router advertisements on " + n.Name, conn, func(ctx context.Context) error { return srv.Serve(ctx, conn) }}}
}

// httpService runs an HTTP server, over TLS if it is set up for that.
func httpService(name string, l net.Listener, server func(context.Context) *http.Server) service {
	return service{name, l, func(ctx context.Context) error {
		// Requests in progress end with a context of their own: downloads
		// are given some time, long polls are not.
		srv := server(ctx)
		stopped := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(stopped)
			grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
			defer cancel()
			if srv.Shutdown(grace) != nil {
				srv.Close()
			}
		})
		if srv.TLSConfig != nil {
			l = tls.NewListener(l, srv.TLSConfig)
		}
		err := srv.Serve(l)
		if !stop() {
			<-stopped
		}
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	}}
}
