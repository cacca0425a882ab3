// Package syslinux makes a FAT volume boot on a BIOS without running
// syslinux's installer: it does to ldlinux.sys and to the boot sector what
// the installer does, on bytes.
//
// Debian ships both only within the installer's program, one after the other.
// They are found by what marks them for installers: a magic number, which
// stands at the end of the boot sector and near the beginning of ldlinux.sys.
// The layout of what is filled in is that of syslinux 6.04
// (libinstaller/syslxint.h: struct patch_area, struct ext_patch_area).
package syslinux

import (
	"bytes"
	"encoding/binary"
	"errors"
)

const (
	sectorSize = 512
	magic      = 0x3eb202fe
	// magicInBoot is where the boot sector has the magic number.
	magicInBoot = 0x1f8
	extentSize  = 10
	maxExtent   = 1<<16/sectorSize - 1 // sectors
	// vectors is the auxiliary data vector, kept twice behind ldlinux.sys:
	// a command for the next boot only. Ours is empty.
	vectors = 2
	maxSize = 1 << 20
)

// Offsets in the patch area, which begins with the magic number.
const (
	patchDataSectors = 8
	patchADVSectors  = 10
	patchDwords      = 12
	patchChecksum    = 16
	patchExtArea     = 22
)

// Offsets in the extended patch area; each has the offset of something else.
const (
	extADVPointers = 0
	extExtents     = 10
	extExtentCount = 12
	extFirstLow    = 14
	extFirstHigh   = 16
	extAreaSize    = 20
)

// Loader is syslinux, not yet installed.
type Loader struct {
	boot  []byte // the boot sector
	image []byte // ldlinux.sys
	area  int    // where image has the patch area
	// Where image has the extents, room for how many, and the pointers to
	// the vectors; where boot has the two halves of the first sector's number.
	extents, count, vectors, low, high int
}

// Extract finds syslinux in the installer's program.
func Extract(program []byte) (*Loader, error) {
	mark := binary.LittleEndian.AppendUint32(nil, magic)
	start := []byte("\r\nSYSLINUX ")
	for at := 0; ; {
		i := bytes.Index(program[at:], start)
		if i < 0 {
			return nil, errors.New("there is no ldlinux.sys in it")
		}
		at += i
		boot := at - sectorSize
		if boot >= 0 && bytes.Equal(program[boot+magicInBoot:boot+magicInBoot+4], mark) && program[boot] == 0xeb && program[boot+510] == 0x55 && program[boot+511] == 0xaa {
			return extract(program[boot:at], program[at:])
		}
		at += len(start)
	}
}

func extract(boot, image []byte) (*Loader, error) {
	// It is whole sectors, and behind it stands the module ldlinux.c32, a
	// 32-bit ELF file.
	end := 0
	for ; end < len(image) && !bytes.HasPrefix(image[end:], []byte("\x7fELF\x01\x01\x01")); end += sectorSize {
		if end > maxSize {
			break
		}
	}
	if end == 0 || end > maxSize || end >= len(image) {
		return nil, errors.New("ldlinux.sys has no end")
	}
	l := &Loader{boot: bytes.Clone(boot), image: bytes.Clone(image[:end])}
	mark := binary.LittleEndian.AppendUint32(nil, magic)
	for l.area = 0; ; l.area += 4 {
		if l.area+patchExtArea+2 > len(l.image) {
			return nil, errors.New("ldlinux.sys has no patch area")
		}
		if bytes.Equal(l.image[l.area:l.area+4], mark) {
			break
		}
	}
	le := binary.LittleEndian
	ext := int(le.Uint16(l.image[l.area+patchExtArea:]))
	if ext+extAreaSize > len(l.image) {
		return nil, errors.New("ldlinux.sys has no extended patch area")
	}
	field := func(offset int) int { return int(le.Uint16(l.image[ext+offset:])) }
	l.extents, l.count, l.vectors = field(extExtents), field(extExtentCount), field(extADVPointers)
	l.low, l.high = field(extFirstLow), field(extFirstHigh)
	if l.extents+l.count*extentSize > len(l.image) || l.count*maxExtent < len(l.image)/sectorSize ||
		l.vectors+vectors*8 > len(l.image) || l.low+4 > sectorSize || l.high+4 > sectorSize {
		return nil, errors.New("the patch area of ldlinux.sys is of another version")
	}
	return l, nil
}

// emptyADV is an auxiliary data vector without data: a mark, the checksum
// (the words between the marks and it add up to the second number), and a
// mark at the end.
func emptyADV() []byte {
	b := make([]byte, sectorSize)
	le := binary.LittleEndian
	le.PutUint32(b, 0x5a2d2fa5)
	le.PutUint32(b[4:], 0xa3041767)
	le.PutUint32(b[sectorSize-4:], 0xdd28bf64)
	return b
}

// Size is the number of bytes of the file ldlinux.sys once it is installed.
func (l *Loader) Size() int { return len(l.image) + vectors*sectorSize }

// Install gives the boot sector and the file ldlinux.sys for a volume that
// has the file's sectors in one run from first on, counted from the volume's
// beginning.
func (l *Loader) Install(first uint64) (boot, file []byte) {
	boot, file = bytes.Clone(l.boot), bytes.Clone(l.image)
	le := binary.LittleEndian
	sectors := uint64(len(file) / sectorSize)
	le.PutUint32(boot[l.low:], uint32(first))
	le.PutUint32(boot[l.high:], uint32(first>>32))
	area := file[l.area:]
	le.PutUint16(area[patchDataSectors:], uint16(sectors))
	le.PutUint16(area[patchADVSectors:], vectors)
	le.PutUint32(area[patchDwords:], uint32(len(file)/4))

	table := file[l.extents:]
	clear(table[:l.count*extentSize])
	for _, e := range extents(first+1, sectors-1) {
		le.PutUint64(table, e.sector)
		le.PutUint16(table[8:], uint16(e.count))
		table = table[extentSize:]
	}
	for i := range uint64(vectors) {
		le.PutUint64(file[l.vectors+int(i)*8:], first+sectors+i)
	}
	le.PutUint32(area[patchChecksum:], 0)
	sum := uint32(magic)
	for i := 0; i+4 <= len(file); i += 4 {
		sum -= le.Uint32(file[i:])
	}
	le.PutUint32(area[patchChecksum:], sum)
	for range vectors {
		file = append(file, emptyADV()...)
	}
	return boot, file
}

type extent struct{ sector, count uint64 }

// extents splits a run of sectors into parts of less than 64 KiB.
func extents(first, count uint64) (list []extent) {
	for count > 0 {
		n := min(count, maxExtent)
		list = append(list, extent{first, n})
		first, count = first+n, count-n
	}
	return list
}
