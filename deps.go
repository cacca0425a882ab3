//go:build deps

package mosimg

import (
	_ "github.com/ProtonMail/go-crypto/openpgp"
	_ "github.com/ProtonMail/go-crypto/openpgp/clearsign"
	_ "github.com/checkpoint-restore/go-criu/v7/rpc"
	_ "github.com/google/go-cmp/cmp"
	_ "github.com/hashicorp/memberlist"
	_ "github.com/insomniacslk/dhcp/dhcpv4"
	_ "github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	_ "github.com/insomniacslk/dhcp/dhcpv4/server4"
	_ "github.com/klauspost/compress/zstd"
	_ "github.com/pin/tftp/v3"
	_ "github.com/spf13/cobra"
	_ "github.com/therootcompany/xz"
	_ "github.com/u-root/mkuimage/cpio"
	_ "github.com/u-root/mkuimage/uimage"
	_ "github.com/u-root/gobusybox/src/pkg/golang"
	_ "github.com/u-root/uio/llog"
	_ "github.com/vishvananda/netlink"
	_ "go.etcd.io/bbolt"
	_ "go.yaml.in/yaml/v3"
	_ "golang.org/x/net/ipv4"
	_ "golang.org/x/sys/unix"
	_ "google.golang.org/protobuf/proto"
)
