package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/pe"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"mosimg/image/fat"
	"mosimg/image/gpt"
	"mosimg/image/iso"
	"mosimg/image/qcow2"
	"mosimg/image/syslinux"
	"mosimg/image/uki"
	"mosimg/internal/bootargs"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
)

// The boot media: what machines boot that do not boot from the network.
const (
	outputUKI   = "uki"
	outputDisk  = "disk"
	outputISO   = "iso"
	outputQCOW2 = "qcow2"
)

func (o *Options) makes(kind string) bool { return slices.Contains(o.Outputs, kind) }

func (o *Options) hasMedia() bool {
	return o.makes(outputUKI) || o.makes(outputDisk) || o.makes(outputISO) || o.makes(outputQCOW2)
}

// checkHead tells what is wrong with --head and --ca. The node would refuse
// the same, but only once it has booted.
func (o *Options) checkHead() (faults []error) {
	if o.Head == "" && o.CA == "" {
		return nil
	}
	if !o.hasMedia() {
		faults = append(faults, errors.New("--head and --ca are for --outputs uki, disk, iso and qcow2; machines that boot from the network are told by their head"))
	}
	if o.Head == "" || o.CA == "" {
		faults = append(faults, errors.New("--head and --ca belong together"))
	}
	u, err := url.Parse(o.Head)
	if o.Head != "" && (err != nil || u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" || strings.Trim(u.Path, "/") != "" ||
		u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.ContainsAny(o.Head, " \t\n\"")) {
		faults = append(faults, fmt.Errorf("--head %s is not of the form https://ADDRESS:PORT", o.Head))
	}
	digest, ok := strings.CutPrefix(o.CA, "sha256:")
	if sum, err := hex.DecodeString(digest); o.CA != "" && (!ok || err != nil || len(sum) != sha256.Size) {
		faults = append(faults, fmt.Errorf("--ca %s is not of the form sha256:64-HEX-DIGITS", o.CA))
	}
	return faults
}

// maxCommandLine is COMMAND_LINE_SIZE of an x86 kernel without its final NUL.
const maxCommandLine = 2047

// Names on the media.
const (
	efiLoader   = "EFI/BOOT/BOOTX64.EFI" // what firmware boots of a removable medium (UEFI 3.5.1.1)
	biosKernel  = "VMLINUZ"
	biosInitrd  = "INITRD.IMG"
	biosModule  = "LDLINUX.C32"
	biosLoader  = "LDLINUX.SYS"
	volumeLabel = "MOSIMG"
)

// media makes the boot media that were asked for, of the set in dir.
func (b *builder) media(ctx context.Context, dir string, m *imageset.Manifest) error {
	if !b.hasMedia() {
		return nil
	}
	d := &medium{builder: b, dir: dir, set: m}
	d.cmdline = strings.Join(append(slices.Clone(m.KernelArgs), bootargs.Args{Role: "node", Head: b.Head, CA: b.CA, Image: m.ID}.Words()...), " ")
	if len(d.cmdline) > maxCommandLine {
		return fault.New(fault.Usage, "make", "kernel command line", fmt.Sprintf("it has %d bytes, a kernel takes %d", len(d.cmdline), maxCommandLine), "shorten kernel.args in the profile")
	}
	if err := d.unify(); err != nil {
		return fault.New(fault.Environment, "make", imageset.UKI, err, "")
	}
	for _, o := range []struct {
		wanted bool
		name   string
		write  func(*os.File) error
	}{
		{b.makes(outputUKI), imageset.UKI, d.writeUKI},
		{b.makes(outputDisk) || b.makes(outputQCOW2), imageset.Disk, d.writeDisk},
		{b.makes(outputQCOW2), imageset.QCOW2, d.writeQCOW2},
		{b.makes(outputISO), imageset.ISO, d.writeISO},
	} {
		if !o.wanted {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := d.write(o.name, o.write); err != nil {
			return fault.New(fault.Environment, "make", o.name, err, "")
		}
	}
	if !b.makes(outputDisk) {
		m.Files = slices.DeleteFunc(m.Files, func(f imageset.File) bool { return f.Name == imageset.Disk })
		if b.makes(outputQCOW2) {
			return os.Remove(filepath.Join(dir, imageset.Disk))
		}
	}
	return nil
}

// medium is the work on the boot media of one set.
type medium struct {
	*builder
	dir                string
	set                *imageset.Manifest
	cmdline            string
	kernel, initrd     []byte
	uki                []byte
	kernelAt, initrdAt int64 // where uki has the two
}

// loader is a file of the loaders' step.
func (d *medium) loader(name string) ([]byte, error) {
	return os.ReadFile(d.results[stepLoaders].Path(name))
}

// guid is a GUID of this medium: the same for the same content, so that what
// boots cannot be told from another build of it.
func (d *medium) guid(what string) gpt.GUID {
	sum := sha256.Sum256([]byte("mosimg " + what + "\n" + d.set.ID + "\n" + d.cmdline))
	return gpt.NewGUID(sum[:])
}

func (d *medium) serial(what string) uint32 {
	g := d.guid(what)
	return binary.BigEndian.Uint32(g[:])
}

func (d *medium) time() time.Time { return time.Unix(d.mtime, 0).UTC() }

// write makes a file of the set, durably.
func (d *medium) write(name string, fill func(*os.File) error) error {
	path := filepath.Join(d.dir, name)
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	sum, size, err := imageset.HashFile(path)
	d.set.Files = append(d.set.Files, imageset.File{Name: name, Size: size, SHA256: sum})
	return err
}

// unify makes the unified kernel image.
func (d *medium) unify() (err error) {
	if d.kernel, err = os.ReadFile(filepath.Join(d.dir, imageset.Kernel)); err != nil {
		return err
	}
	if d.initrd, err = os.ReadFile(filepath.Join(d.dir, imageset.Initramfs)); err != nil {
		return err
	}
	stub, err := d.loader("stub")
	if err != nil {
		return err
	}
	release := fmt.Sprintf("NAME=mosimg\nID=mosimg\nVERSION_ID=%q\nIMAGE_ID=%.12s\nPRETTY_NAME=%q\n",
		d.set.Version, d.set.ID, "mosimg "+d.set.Version+" ("+d.set.Profile+")")
	if d.uki, err = uki.Assemble(stub, []uki.Section{
		{Name: ".osrel", Data: []byte(release)},
		{Name: ".cmdline", Data: []byte(d.cmdline)},
		{Name: ".uname", Data: []byte(d.set.KernelRelease)},
		{Name: ".initrd", Data: d.initrd},
		{Name: ".linux", Data: d.kernel},
	}); err != nil {
		return err
	}
	f, err := pe.NewFile(bytes.NewReader(d.uki))
	if err != nil {
		return err
	}
	d.kernelAt, d.initrdAt = int64(f.Section(".linux").Offset), int64(f.Section(".initrd").Offset)
	return nil
}

func (d *medium) writeUKI(f *os.File) error {
	_, err := f.Write(d.uki)
	return err
}

// menu is the configuration of syslinux and isolinux.
func (d *medium) menu() []byte {
	return fmt.Appendf(nil, "DEFAULT mosimg\nPROMPT 0\nLABEL mosimg\n  LINUX %s\n  INITRD %s\n  APPEND %s\n", biosKernel, biosInitrd, d.cmdline)
}

const (
	mib = 1 << 20
	// espAt is where the EFI partition begins on every medium.
	espAt = gpt.FirstPartition * gpt.SectorSize
	// diskFree is what a user can put on the EFI partition of a stick.
	diskFree = 16 * mib
)

// partitioned is a medium of one EFI partition, with its tables.
func (d *medium) partitioned(f *os.File, v *fat.Volume, attributes uint64, code []byte) error {
	// The partition ends on a MiB, and the table's copy has the last one.
	end := (espAt + v.Size() + mib - 1) / mib * mib
	size := end + mib
	t := gpt.Table{
		GUID: d.guid("disk"), Sectors: size / gpt.SectorSize, MBRCode: code,
		Partitions: []gpt.Partition{{
			Type: gpt.ESP, GUID: d.guid("EFI partition"), First: gpt.FirstPartition, Last: end/gpt.SectorSize - 1,
			Attributes: attributes, Name: volumeLabel,
		}},
	}
	head, tail, err := t.Encode()
	if err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	if _, err := f.WriteAt(head, 0); err != nil {
		return err
	}
	if err := v.WriteTo(f, espAt); err != nil {
		return err
	}
	_, err = f.WriteAt(tail, size-int64(len(tail)))
	return err
}

// writeDisk makes the image for sticks and disks: UEFI boots the unified
// image, a BIOS boots by syslinux from the same partition.
func (d *medium) writeDisk(f *os.File) error {
	program, err := d.loader("syslinux")
	if err != nil {
		return err
	}
	bios, err := syslinux.Extract(program)
	if err != nil {
		return fmt.Errorf("program syslinux: %w", err)
	}
	module, err := d.loader("ldlinux.c32")
	if err != nil {
		return err
	}
	code, err := d.loader("gptmbr.bin")
	if err != nil {
		return err
	}
	loader := make([]byte, bios.Size()) // filled in when its place is known
	v, err := fat.New(fat.Options{
		Label: volumeLabel, ID: d.serial("disk volume"), Time: d.time(), Free: diskFree, Hidden: gpt.FirstPartition,
		Files: []fat.File{
			{Name: biosLoader, Data: loader, System: true},
			{Name: biosModule, Data: module, System: true},
			{Name: "SYSLINUX.CFG", Data: d.menu()},
			{Name: biosKernel, Data: d.kernel},
			{Name: biosInitrd, Data: d.initrd},
			{Name: efiLoader, Data: d.uki},
		},
	})
	if err != nil {
		return err
	}
	at, _ := v.Offset(biosLoader)
	boot, installed := bios.Install(uint64(at / gpt.SectorSize))
	copy(loader, installed)
	if err := v.SetBootCode(boot); err != nil {
		return err
	}
	return d.partitioned(f, v, gpt.LegacyBoot, code)
}

func (d *medium) writeQCOW2(f *os.File) error {
	disk, err := os.Open(filepath.Join(d.dir, imageset.Disk))
	if err != nil {
		return err
	}
	defer disk.Close()
	size, err := disk.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	return qcow2.Write(f, disk, size)
}

// writeISO makes the image for CDs, which is one for sticks too. UEFI boots
// the EFI partition. A BIOS boots isolinux, for which kernel and initramfs are
// files that lie within the unified image.
func (d *medium) writeISO(f *os.File) error {
	v, err := fat.New(fat.Options{
		Label: volumeLabel, ID: d.serial("ISO volume"), Time: d.time(), Hidden: gpt.FirstPartition,
		Files: []fat.File{{Name: efiLoader, Data: d.uki}},
	})
	if err != nil {
		return err
	}
	ukiAt, _ := v.Offset(efiLoader)
	block := func(at int64) uint32 { return uint32((espAt + ukiAt + at) / iso.BlockSize) }
	o := iso.Options{
		Label: volumeLabel, Time: d.time(), BIOS: "ISOLINUX.BIN",
		UEFI: iso.File{Name: "the EFI partition", Block: espAt / iso.BlockSize, Size: uint32(v.Size())},
		Files: []iso.File{
			{Name: biosKernel + ".", Block: block(d.kernelAt), Size: uint32(len(d.kernel))},
			{Name: biosInitrd, Block: block(d.initrdAt), Size: uint32(len(d.initrd))},
		},
	}
	// The small files lie between the head and the EFI partition.
	next := uint32(iso.FirstFree)
	var hybrid []byte
	for _, name := range []string{o.BIOS, biosModule, "ISOLINUX.CFG"} {
		data := d.menu()
		if name != "ISOLINUX.CFG" {
			if data, err = d.loader(strings.ToLower(name)); err != nil {
				return err
			}
		}
		if name == o.BIOS {
			code, err := d.loader("isohdpfx.bin")
			if err != nil {
				return err
			}
			if hybrid, err = iso.HybridMBR(code, next, d.serial("ISO disk")); err != nil {
				return err
			}
			if data, err = iso.PatchISOLINUX(data, next); err != nil {
				return err
			}
		}
		at := int64(next) * iso.BlockSize
		if at+int64(len(data)) > espAt {
			return fmt.Errorf("%s does not fit before the EFI partition", name)
		}
		if _, err := f.WriteAt(data, at); err != nil {
			return err
		}
		o.Files = append(o.Files, iso.File{Name: name, Block: next, Size: uint32(len(data))})
		next += uint32((len(data) + iso.BlockSize - 1) / iso.BlockSize)
	}
	if err := d.partitioned(f, v, 0, hybrid); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	o.Blocks = uint32(st.Size() / iso.BlockSize)
	head, err := iso.Head(o)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(head, 16*iso.BlockSize)
	return err
}
