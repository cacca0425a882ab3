package debian

import (
	"bytes"
	"context"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
)

// Host is what a machine's apt is set up with.
type Host struct {
	Mirrors  []string // roots of Debian archives, in apt's order
	Security []string // roots of Debian security archives
	proxies  map[string]string
}

// debianSuites are the names by which a source is known to be a Debian
// archive. Hosts name their mirrors as they like, suites are always these.
var debianSuites = []string{
	"sid", "unstable", "testing", "stable", "oldstable", "oldoldstable",
	"duke", "forky", "trixie", "bookworm", "bullseye", "buster",
}

// ReadHost reads the apt configuration under root ("/" on a real machine):
// sources.list, sources.list.d/*.list and *.sources, and, when apt is there,
// its proxies. What cannot be read is left out: it only means fewer
// candidates, and the signature decides about each of them.
func ReadHost(ctx context.Context, root string) *Host {
	h := &Host{proxies: make(map[string]string)}
	etc := filepath.Join(root, "etc", "apt")
	lists, _ := filepath.Glob(filepath.Join(etc, "sources.list.d", "*"))
	sort.Strings(lists)
	for _, name := range append([]string{filepath.Join(etc, "sources.list")}, lists...) {
		data, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		switch filepath.Ext(name) {
		case ".list":
			h.addList(string(data))
		case ".sources":
			h.addDeb822(data)
		}
	}
	if root == "/" {
		if out, err := exec.CommandContext(ctx, "apt-config", "dump").Output(); err == nil {
			h.proxies = parseProxies(string(out))
		}
	}
	return h
}

// addList reads the one-line style: deb [options] URI suite component...
func (h *Host) addList(text string) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || rest == "" || !strings.ContainsAny(rest[:1], " \t[") { // "deb", but not "deb-src"
			continue
		}
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			_, after, closed := strings.Cut(rest, "]")
			if !closed {
				continue
			}
			rest = after
		}
		if w := strings.Fields(rest); len(w) >= 2 {
			h.add(w[0], w[1])
		}
	}
}

// addDeb822 reads the paragraph style of *.sources.
func (h *Host) addDeb822(data []byte) {
	_ = ReadControl(bytes.NewReader(data), func(p Paragraph) error {
		if strings.EqualFold(p.Get("Enabled"), "no") || !slices.Contains(strings.Fields(p.Get("Types")), "deb") {
			return nil
		}
		for uri := range strings.FieldsSeq(p.Get("URIs")) {
			for suite := range strings.FieldsSeq(p.Get("Suites")) {
				h.add(uri, suite)
			}
		}
		return nil
	})
}

func (h *Host) add(uri, suite string) {
	u, err := url.Parse(uri)
	if err != nil || !slices.Contains([]string{"http", "https", "file"}, u.Scheme) {
		return
	}
	base, variant, _ := strings.Cut(strings.TrimSuffix(suite, "/"), "-")
	if old, ok := strings.CutSuffix(base, "/updates"); ok { // security suites before bullseye
		base, variant = old, "security"
	}
	if !slices.Contains(debianSuites, base) {
		return
	}
	list := &h.Mirrors
	if variant == "security" {
		list = &h.Security
	}
	if root := strings.TrimRight(uri, "/"); !slices.Contains(*list, root) {
		*list = append(*list, root)
	}
}

// parseProxies reads the proxies from "apt-config dump". Keys are lower case
// from the scheme on: "http" or, for one host, "http::HOST".
func parseProxies(dump string) map[string]string {
	m := make(map[string]string)
	for line := range strings.Lines(dump) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		key = strings.ToLower(key)
		rest, acquire := strings.CutPrefix(key, "acquire::")
		if !ok || !acquire {
			continue
		}
		value = strings.Trim(value, `";`)
		for _, scheme := range []string{"http", "https"} {
			if rest == scheme+"::proxy" {
				m[scheme] = value
			} else if host, ok := strings.CutPrefix(rest, scheme+"::proxy::"); ok {
				m[scheme+"::"+host] = value
			}
		}
	}
	return m
}

// Proxy answers for a Fetcher: apt's proxy for the host, for the scheme, or
// else the environment's. "DIRECT" means none.
func (h *Host) Proxy(req *http.Request) (*url.URL, error) {
	for _, key := range []string{req.URL.Scheme + "::" + req.URL.Hostname(), req.URL.Scheme} {
		if p := h.proxies[key]; p == "DIRECT" {
			return nil, nil
		} else if p != "" {
			return url.Parse(p)
		}
	}
	return http.ProxyFromEnvironment(req)
}

// securityRoots is where the security archive may be for a mirror: what apt
// names, else the folder "debian-security" next to the mirror.
func (h *Host) securityRoots(mirror string, explicit bool) []string {
	var beside []string
	if dir, ok := strings.CutSuffix(mirror, "/debian"); ok {
		beside = []string{dir + "/debian-security"}
	}
	if explicit { // what was asked for wins over the host's own
		return append(beside, h.Security...)
	}
	return append(slices.Clone(h.Security), beside...)
}
