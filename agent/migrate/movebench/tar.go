package movebench

import (
	"archive/tar"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/identity"
)

// tarOver sends the files of a folder to another one, as a tar archive over a
// TLS connection of the kind that nodes have.
func tarOver(src, dst string) error {
	a, b, err := tcpPair()
	if err != nil {
		return err
	}
	defer a.Close()
	defer b.Close()
	client, server, err := tlsPair(a, b)
	if err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		err := sendTar(client, src)
		if err == nil {
			err = client.CloseWrite()
		}
		if err != nil {
			a.Close()
		}
		sent <- err
	}()
	err = takeTar(server, dst)
	if err != nil {
		b.Close()
	}
	return errors.Join(err, <-sent)
}

func tlsPair(a, b net.Conn) (client, server *tls.Conn, err error) {
	ca, err := identity.NewCA("bench")
	if err != nil {
		return nil, nil, err
	}
	source := func(id api.NodeID) (identity.Source, error) {
		key, err := identity.NewKey()
		if err != nil {
			return nil, err
		}
		cert, err := ca.IssueNode(key.Public(), id, net.IPv4(127, 0, 0, 1), time.Now())
		if err != nil {
			return nil, err
		}
		return func() (*tls.Certificate, error) { return identity.TLSCertificate(cert, ca.Cert, key), nil }, nil
	}
	one, err := source(1)
	if err != nil {
		return nil, nil, err
	}
	two, err := source(2)
	if err != nil {
		return nil, nil, err
	}
	return tls.Client(a, identity.ClientToNode(one, ca.Cert, 2, nobodyRevoked)), tls.Server(b, identity.ServerConfig(two, ca.Cert, nobodyRevoked, false)), nil
}

func sendTar(w io.Writer, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	for _, e := range entries {
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		fi, err := f.Stat()
		if err == nil {
			err = t.WriteHeader(&tar.Header{Name: e.Name(), Mode: 0o600, Size: fi.Size()})
		}
		if err == nil {
			_, err = io.Copy(t, f)
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	return t.Close()
}

func takeTar(r io.Reader, dir string) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		f, err := os.Create(filepath.Join(dir, filepath.Base(h.Name)))
		if err != nil {
			return err
		}
		_, err = io.Copy(f, t)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
}
