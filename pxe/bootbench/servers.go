package bootbench

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"mosimg/internal/imageset"
	"mosimg/pxe/httpd"
	"mosimg/pxe/images"
	"mosimg/pxe/tftpd"
)

// fileName is the boot loader that is fetched.
const fileName = "bench.efi"

// makeSet makes an image set with a boot loader of that size and returns the
// folder that has the loader.
func makeSet(dir string, size int) (boot string, err error) {
	m := &imageset.Manifest{Format: imageset.Format, Arch: "amd64", Profile: "bench"}
	loader := make([]byte, size)
	random := rand.NewChaCha8([32]byte{})
	_, _ = random.Read(loader) // never fails
	boot = filepath.Join(dir, imageset.BootDir)
	if err := os.MkdirAll(boot, 0o755); err != nil {
		return "", err
	}
	for name, data := range map[string][]byte{imageset.Kernel: {0}, imageset.Initramfs: {0}, imageset.BootDir + "/" + fileName: loader} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return "", err
		}
		sum := sha256.Sum256(data)
		m.Files = append(m.Files, imageset.File{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])})
	}
	m.ID = m.ComputeID()
	return boot, m.Write(dir)
}

// serverConfig is what our server is to do.
type serverConfig struct{ Kind, Dir, Addr string }

// ServerMain is our server.
func ServerMain(ctx context.Context, config string) error {
	var conf serverConfig
	if err := json.Unmarshal([]byte(config), &conf); err != nil {
		return err
	}
	store, err := images.Open(conf.Dir, nil)
	if err != nil {
		return err
	}
	if conf.Kind == HTTP {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp4", conf.Addr)
		if err != nil {
			return err
		}
		srv := (&httpd.Server{Images: store}).NewHTTPServer(ctx)
		context.AfterFunc(ctx, func() { srv.Close() })
		if err := srv.Serve(l); ctx.Err() == nil {
			return err
		}
		return nil
	}
	addr, err := net.ResolveUDPAddr("udp4", conf.Addr)
	if err != nil {
		return err
	}
	conn, err := net.ListenUDP("udp4", addr)
	if err != nil {
		return err
	}
	return (&tftpd.Server{Loader: store.Loader}).Serve(ctx, conn)
}

// server is a running server, ours or a peer.
type server struct {
	name string
	addr string
	path string // of the file there
	cmd  *exec.Cmd
	// ended is closed when it has ended, which it should not by itself.
	ended chan struct{}
	said  string // by then
}

// start starts a server's program, which lives until ctx ends.
func start(ctx context.Context, name, addr, path, program string, args ...string) (*server, error) {
	s := &server{name: name, addr: addr, path: path, cmd: exec.CommandContext(ctx, program, args...), ended: make(chan struct{})}
	said := new(bytes.Buffer) // what it says matters when it ends
	s.cmd.Stdout, s.cmd.Stderr = said, said
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		s.cmd.Wait()
		s.said = said.String()
		close(s.ended)
	}()
	return s, nil
}

// ours starts our server.
func ours(ctx context.Context, kind, dir, addr, path string) (*server, error) {
	data, err := json.Marshal(serverConfig{Kind: kind, Dir: dir, Addr: addr})
	if err != nil {
		return nil, err
	}
	return start(ctx, "mosimg", addr, path, "/proc/self/exe", ServerVerb, string(data))
}

func startTFTP(ctx context.Context, dir, boot string) ([]*server, error) {
	own, err := ours(ctx, TFTP, dir, "127.0.0.1:69", fileName)
	if err != nil {
		return nil, err
	}
	program, err := look("dnsmasq")
	if err != nil {
		return nil, err
	}
	dnsmasq, err := start(ctx, "dnsmasq "+versionOf(ctx, program, "--version", "version "), "127.0.0.2:69", fileName, program,
		"--no-daemon", "--conf-file=/dev/null", "--port=0", "--enable-tftp", "--tftp-root="+boot, "--tftp-mtu=1500",
		"--listen-address=127.0.0.2", "--bind-interfaces", "--user=root", "--log-facility=/dev/null")
	if err != nil {
		return nil, err
	}
	program, err = look("in.tftpd")
	if err != nil {
		return nil, err
	}
	hpa, err := start(ctx, "tftpd-hpa "+versionOf(ctx, program, "--version", "tftp-hpa "), "127.0.0.3:69", fileName, program,
		"--foreground", "--listen", "--address", "127.0.0.3:69", "--user", "root", "--secure", boot)
	if err != nil {
		return nil, err
	}
	return []*server{own, dnsmasq, hpa}, nil
}

func startHTTP(ctx context.Context, dir, boot string) ([]*server, error) {
	own, err := ours(ctx, HTTP, dir, "127.0.0.1:80", "/boot/"+fileName)
	if err != nil {
		return nil, err
	}
	program, err := look("nginx")
	if err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "nginx.conf")
	text := fmt.Sprintf(`daemon off; user root; worker_processes auto; pid %[1]s/nginx.pid; error_log /dev/null crit;
events { worker_connections 1024; }
http {
  access_log off; sendfile on; tcp_nopush on; keepalive_timeout 65;
  client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  server { listen 127.0.0.2:80; root %[2]s; }
}
`, dir, boot)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	nginx, err := start(ctx, "nginx "+versionOf(ctx, program, "-v", "nginx/")+" (sendfile, tcp_nopush)", "127.0.0.2:80", "/"+fileName, program, "-p", dir, "-c", conf)
	if err != nil {
		return nil, err
	}
	return []*server{own, nginx}, nil
}

// versionOf is the word after a text in what a program says of itself.
func versionOf(ctx context.Context, program, flag, after string) string {
	out, _ := exec.CommandContext(ctx, program, flag).CombinedOutput() // the text is what counts
	_, rest, ok := strings.Cut(string(out), after)
	if f := strings.FieldsFunc(rest, func(r rune) bool { return r == ' ' || r == ',' || r == '\n' }); ok && len(f) > 0 {
		return f[0]
	}
	return ""
}

// cpu is the CPU time of a server and its children.
func (s *server) cpu() (time.Duration, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	var ticks int64
	for _, name := range stats {
		data, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		// pid (comm) state ppid ...: utime and stime are fields 14 and 15 (proc(5)).
		_, rest, _ := strings.Cut(string(data), ") ")
		f := strings.Fields(rest)
		if len(f) < 13 {
			continue
		}
		pid := filepath.Base(filepath.Dir(name))
		if own := strconv.Itoa(s.cmd.Process.Pid); pid != own && f[1] != own {
			continue
		}
		for _, x := range f[11:13] {
			n, err := strconv.ParseInt(x, 10, 64)
			if err != nil {
				return 0, err
			}
			ticks += n
		}
	}
	return time.Duration(ticks) * time.Second / clockTicks, nil
}

// clockTicks is USER_HZ, which is 100 on each architecture that we build for.
const clockTicks = 100

// await waits until a server answers.
func (s *server) await(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		pause := time.NewTimer(20 * time.Millisecond)
		select {
		case <-s.ended:
			return fmt.Errorf("%s ended (%v): %s", s.name, s.cmd.ProcessState, s.said)
		case <-pause.C:
		case <-ctx.Done():
			return fmt.Errorf("%s does not serve: %w", s.name, err)
		}
	}
}
