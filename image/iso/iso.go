// Package iso writes small ISO 9660 images that boot: by El Torito on a BIOS
// (isolinux) and on UEFI (a FAT image), and, written to a USB stick, by the
// boot code in their first sector and by their partition table.
//
// An image is its head, which this package makes, and what follows: files may
// lie anywhere behind the head, also within the FAT image, so that kernel and
// initramfs are there once for both firmwares. All files are in the root
// folder, with the plain names of ISO 9660 level 1. The bytes depend on the
// arguments alone.
//
// docs/outputs.md says why this is not go-diskfs.
package iso

import (
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// BlockSize is the size of a block, which all numbers here count.
const BlockSize = 2048

// The blocks of the head. The first 16 are the system area: the boot code and
// partition table of a USB stick.
const (
	systemArea      = 16
	volumeBlock     = 16
	bootRecordBlock = 17
	endBlock        = 18
	catalogBlock    = 19
	pathsLittle     = 20
	pathsBig        = 21
	rootBlock       = 22
	// FirstFree is the first block that the head leaves to files.
	FirstFree = 23
)

// File is one file. Its bytes are somebody else's business.
type File struct {
	Name  string // "ISOLINUX.BIN"
	Block uint32 // where it begins
	Size  uint32 // bytes
}

// Options are what an image is made of.
type Options struct {
	Label  string // at most 32 capitals, digits and underscores
	Time   time.Time
	Blocks uint32 // of the whole image
	Files  []File
	BIOS   string // the file to boot on a BIOS
	UEFI   File   // the FAT image, which need not be a file
}

var (
	nameForm  = regexp.MustCompile(`^[A-Z0-9_]{1,8}\.[A-Z0-9_]{0,3}$`)
	labelForm = regexp.MustCompile(`^[A-Z0-9_]{1,32}$`)
)

// Head makes blocks 16 to FirstFree-1 of an image.
func Head(o Options) ([]byte, error) {
	if !labelForm.MatchString(o.Label) {
		return nil, fmt.Errorf("volume label %q is not 1 to 32 capitals, digits and underscores", o.Label)
	}
	files := slices.Clone(o.Files)
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(sortName(a.Name), sortName(b.Name)) })
	var bios File
	end := func(f File) uint64 { return uint64(f.Block) + (uint64(f.Size)+BlockSize-1)/BlockSize }
	for i, f := range append(slices.Clone(files), o.UEFI) {
		switch {
		case i < len(files) && !nameForm.MatchString(f.Name):
			return nil, fmt.Errorf("file name %q is not of the form 8.3 in capitals", f.Name)
		case i > 0 && i < len(files) && files[i-1].Name == f.Name:
			return nil, fmt.Errorf("%s is there twice", f.Name)
		case f.Block < FirstFree || end(f) > uint64(o.Blocks):
			return nil, fmt.Errorf("%s does not lie within the image", f.Name)
		case i < len(files) && f.Name == o.BIOS:
			bios = f
		}
	}
	if bios.Size == 0 {
		return nil, errors.New("it has no file to boot on a BIOS")
	}
	root, err := o.rootFolder(files)
	if err != nil {
		return nil, err
	}
	b := make([]byte, (FirstFree-systemArea)*BlockSize)
	at := func(block int) []byte { return b[(block-systemArea)*BlockSize:] }
	o.volume(at(volumeBlock))
	copy(at(bootRecordBlock), "\x00CD001\x01EL TORITO SPECIFICATION")
	binary.LittleEndian.PutUint32(at(bootRecordBlock)[71:], catalogBlock)
	copy(at(endBlock), "\xffCD001\x01")
	copy(at(catalogBlock), catalog(bios, o.UEFI))
	// The path table: one entry for the root.
	copy(at(pathsLittle), []byte{1, 0, rootBlock, 0, 0, 0, 1, 0, 0, 0})
	copy(at(pathsBig), []byte{1, 0, 0, 0, 0, rootBlock, 0, 1, 0, 0})
	copy(at(rootBlock), root)
	return b, nil
}

// sortName orders names as the standard wants it: name and extension apart,
// filled up with spaces.
func sortName(name string) string {
	base, ext, _ := strings.Cut(name, ".")
	return fmt.Sprintf("%-8s%-3s", base, ext)
}

// both is a number in both byte orders, as most numbers of the standard are.
func both(b []byte, n uint32) {
	binary.LittleEndian.PutUint32(b, n)
	binary.BigEndian.PutUint32(b[4:], n)
}

func both16(b []byte, n uint16) {
	binary.LittleEndian.PutUint16(b, n)
	binary.BigEndian.PutUint16(b[2:], n)
}

// volume is the primary volume descriptor (ECMA-119, 8.4).
func (o *Options) volume(b []byte) {
	text := func(at, length int, s string) { copy(b[at:at+length], fmt.Sprintf("%-*s", length, s)) }
	copy(b, "\x01CD001\x01")
	text(8, 32, "")
	text(40, 32, o.Label)
	both(b[80:], o.Blocks)
	both16(b[120:], 1) // one volume, the first
	both16(b[124:], 1)
	both16(b[128:], BlockSize)
	both(b[132:], 10) // bytes of the path table
	binary.LittleEndian.PutUint32(b[140:], pathsLittle)
	binary.BigEndian.PutUint32(b[148:], pathsBig)
	copy(b[156:], o.record("\x00", rootBlock, BlockSize, true))
	text(190, 128, "")       // volume set
	text(318, 128, "")       // publisher
	text(446, 128, "MOSIMG") // preparer
	text(574, 128, "")       // application
	text(702, 37*3, "")      // files with copyright, abstract, bibliography
	date := o.Time.UTC().Format("20060102150405") + "00\x00"
	none := strings.Repeat("0", 16) + "\x00"
	copy(b[813:], date+date+none+none) // created, changed, expires, effective
	b[881] = 1
}

// record is a directory record (ECMA-119, 9.1).
func (o *Options) record(name string, block, size uint32, folder bool) []byte {
	length := 33 + len(name)
	length += length % 2
	b := make([]byte, length)
	b[0] = byte(length)
	both(b[2:], block)
	both(b[10:], size)
	t := o.Time.UTC()
	copy(b[18:], []byte{byte(t.Year() - 1900), byte(t.Month()), byte(t.Day()), byte(t.Hour()), byte(t.Minute()), byte(t.Second()), 0})
	if folder {
		b[25] = 2
	}
	both16(b[28:], 1)
	b[32] = byte(len(name))
	copy(b[33:], name)
	return b
}

func (o *Options) rootFolder(files []File) ([]byte, error) {
	b := append(o.record("\x00", rootBlock, BlockSize, true), o.record("\x01", rootBlock, BlockSize, true)...)
	for _, f := range files {
		b = append(b, o.record(f.Name+";1", f.Block, f.Size, false)...)
	}
	if len(b) > BlockSize {
		return nil, fmt.Errorf("%d files are too many for one folder", len(files))
	}
	return b, nil
}

const (
	platformBIOS = 0
	platformUEFI = 0xef
	// biosSectors is how much of the boot file the BIOS loads, in sectors
	// of 512 bytes: isolinux loads the rest by itself.
	biosSectors = 4
)

// catalog is the boot catalogue (El Torito, section 2).
func catalog(bios, uefi File) []byte {
	b := make([]byte, 128)
	le := binary.LittleEndian
	entry := func(at int, block uint32, sectors uint16) {
		b[at] = 0x88 // bootable; what follows at +1 is "no emulation"
		le.PutUint16(b[at+6:], sectors)
		le.PutUint32(b[at+8:], block)
	}
	b[0], b[1] = 1, platformBIOS
	b[30], b[31] = 0x55, 0xaa
	var sum uint16
	for i := 0; i < 32; i += 2 {
		sum += le.Uint16(b[i:])
	}
	le.PutUint16(b[28:], -sum)
	entry(32, bios.Block, biosSectors)
	b[64], b[65], b[66] = 0x91, platformUEFI, 1 // the last section, with one entry
	// A larger FAT image than the field can say has 0 there: up to the end
	// of the medium (UEFI 13.3.2.1).
	sectors := (uint64(uefi.Size) + 511) / 512
	if sectors > 0xffff {
		sectors = 0
	}
	entry(96, uefi.Block, uint16(sectors))
	return b
}

// isolinux's marks and fields: the boot information table that it is
// configured by, and the number by which the code for USB sticks knows it.
const (
	infoTable   = 8
	infoEnd     = 64
	hybridMagic = 0x7078c0fb
)

// PatchISOLINUX fills in isolinux.bin's boot information table, which tells
// it where it lies.
func PatchISOLINUX(program []byte, block uint32) ([]byte, error) {
	le := binary.LittleEndian
	if len(program) < BlockSize || le.Uint32(program[infoEnd:]) != hybridMagic {
		return nil, errors.New("this is no isolinux.bin for CDs and USB sticks")
	}
	b := slices.Clone(program)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	le.PutUint32(b[infoTable:], volumeBlock)
	le.PutUint32(b[infoTable+4:], block)
	le.PutUint32(b[infoTable+8:], uint32(len(program)))
	var sum uint32
	for i := infoEnd; i < len(b); i += 4 {
		sum += le.Uint32(b[i:])
	}
	le.PutUint32(b[infoTable+12:], sum)
	clear(b[infoTable+16 : infoEnd])
	return b, nil
}

// hybridCode is the size of isohdpfx.bin, and where its fields begin.
const hybridCode = 432

// HybridMBR is the boot code of a USB stick, which loads isolinux.bin from
// its block: isohdpfx.bin with its fields filled in.
func HybridMBR(code []byte, block uint32, diskID uint32) ([]byte, error) {
	if len(code) != hybridCode {
		return nil, fmt.Errorf("isohdpfx.bin has %d bytes, not %d", len(code), hybridCode)
	}
	b := binary.LittleEndian.AppendUint64(slices.Clone(code), uint64(block)*(BlockSize/512))
	b = binary.LittleEndian.AppendUint32(b, diskID)
	return append(b, 0, 0), nil
}
