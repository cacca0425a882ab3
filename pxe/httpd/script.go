package httpd

import (
	"fmt"
	"sort"
	"strings"

	"mosimg/internal/bootargs"
	"mosimg/internal/imageset"
	"mosimg/pxe/images"
)

// Boot is all that goes into a machine's script.
type Boot struct {
	// Self is the URL of this script, to begin again with a fresh nonce.
	Self string
	// URL is the head's HTTP root, without a slash at the end.
	URL string
	// Sets are the image sets to choose from, by arch.
	Sets map[string]*images.Set
	// KernelArgs come after those of the image set.
	KernelArgs []string
	// Args are our own words; Image is filled in.
	Args bootargs.Args
}

// Text is the iPXE script that boots a machine. A failed download begins the
// script again after a pause: the image set may have been replaced by then,
// and the nonce too old.
func (b Boot) Text() string {
	var s strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&s, format+"\n", args...) }
	line("#!ipxe")
	line("echo mosimg: booting %s from %s", b.Args.BootMAC, b.URL)
	archs := make([]string, 0, len(b.Sets))
	for a := range b.Sets {
		archs = append(archs, a)
	}
	sort.Strings(archs)
	if len(archs) > 1 {
		// CPUID extended feature 29 is long mode. UEFI that got this far
		// is x64.
		line("iseq ${platform} efi && goto amd64 ||")
		line("cpuid --ext 29 && goto amd64 || goto 386")
	}
	for _, arch := range archs {
		set := b.Sets[arch]
		args := b.Args
		args.Image = set.Manifest.ID
		// The name after --name is what initrd= names on UEFI, where the
		// kernel's EFI stub loads it by that name.
		words := []string{"initrd=" + imageset.Initramfs}
		words = append(words, set.Manifest.KernelArgs...)
		words = append(words, b.KernelArgs...)
		words = append(words, args.Words()...)
		line(":%s", arch)
		line("kernel %s %s || goto failed", b.fileURL(set, imageset.Kernel), strings.Join(words, " "))
		line("initrd --name %s %s || goto failed", imageset.Initramfs, b.fileURL(set, imageset.Initramfs))
		line("boot || goto failed")
	}
	line(":failed")
	line("echo mosimg: that did not work, trying again in 5 seconds")
	line("imgfree ||")
	line("sleep 5")
	line("chain --replace %s || goto failed", b.Self)
	return s.String()
}

func (b Boot) fileURL(set *images.Set, name string) string {
	return b.URL + "/i/" + set.File(name).SHA256 + "/" + name
}

// Local is the script of a machine that is not to join now: it says why and
// leaves iPXE after 3 s, so that the firmware goes on with the next device. The
// status of exit is for UEFI: one that is told of success has booted what it
// wanted, and shows its menu (UEFI 2.10 section 3.1.1).
func Local(reason string) string {
	return "#!ipxe\necho mosimg: this machine may not join: " + plain(reason) + "\necho mosimg: starting from the next boot device\nsleep 3\nexit 1\n"
}

// plain takes from a text what iPXE's parser would act on.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || strings.ContainsRune("${}|&#\\\"'", r) {
			return ' '
		}
		return r
	}, s)
}
