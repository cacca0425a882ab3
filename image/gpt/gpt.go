// Package gpt writes GUID partition tables (UEFI specification, chapter 5)
// with a protective MBR. It computes bytes and does no I/O.
package gpt

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"unicode/utf16"
)

const (
	// SectorSize is the size of a sector; disks with larger ones do not
	// boot from our images.
	SectorSize = 512
	// TableSectors is what the table takes after the MBR, and its copy at
	// the end: a header and 128 entries.
	TableSectors = 33

	entries   = 128
	entrySize = 128
	// FirstPartition is where partitions begin at the earliest: on a MiB,
	// as every tool has them.
	FirstPartition = 2048
)

// GUID is one in the order of its text form.
type GUID [16]byte

// ESP is the type of EFI system partitions.
var ESP = GUID{0xc1, 0x2a, 0x73, 0x28, 0xf8, 0x1f, 0x11, 0xd2, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}

// LegacyBoot is the attribute of a partition that a BIOS is to boot.
const LegacyBoot = 1 << 2

// NewGUID makes a random-looking GUID (version 8, RFC 9562) of 16 bytes of a
// hash.
func NewGUID(hash []byte) (g GUID) {
	copy(g[:], hash)
	g[6] = g[6]&0x0f | 0x80
	g[8] = g[8]&0x3f | 0x80
	return g
}

// disk is the GUID as it is stored: its first three numbers little-endian.
func (g GUID) disk() []byte {
	return []byte{g[3], g[2], g[1], g[0], g[5], g[4], g[7], g[6], g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15]}
}

// Partition is one partition.
type Partition struct {
	Type, GUID  GUID
	First, Last int64 // sectors
	Attributes  uint64
	Name        string // at most 36 UTF-16 units
}

// Table is a partition table.
type Table struct {
	GUID       GUID
	Sectors    int64 // of the disk
	Partitions []Partition
	// MBRCode is put at the beginning of the protective MBR: at most 446
	// bytes.
	MBRCode []byte
}

// Encode gives what goes to the beginning of the disk and what goes to its
// end. An error means that the table is not one.
func (t *Table) Encode() (head, tail []byte, err error) {
	firstUsable, lastUsable := int64(FirstPartition), t.Sectors-TableSectors-1
	if len(t.MBRCode) > 446 || len(t.Partitions) > entries {
		return nil, nil, fmt.Errorf("%d bytes of boot code, %d partitions", len(t.MBRCode), len(t.Partitions))
	}
	list := make([]byte, entries*entrySize)
	le := binary.LittleEndian
	last := firstUsable - 1
	for i, p := range t.Partitions {
		if p.First <= last || p.Last < p.First || p.Last > lastUsable {
			return nil, nil, fmt.Errorf("partition %d, sectors %d to %d, does not fit into %d to %d", i+1, p.First, p.Last, last+1, lastUsable)
		}
		last = p.Last
		e := list[i*entrySize:]
		copy(e, p.Type.disk())
		copy(e[16:], p.GUID.disk())
		le.PutUint64(e[32:], uint64(p.First))
		le.PutUint64(e[40:], uint64(p.Last))
		le.PutUint64(e[48:], p.Attributes)
		name := utf16.Encode([]rune(p.Name))
		if len(name) > 36 {
			return nil, nil, fmt.Errorf("the name of partition %d is too long", i+1)
		}
		for j, u := range name {
			le.PutUint16(e[56+2*j:], u)
		}
	}
	header := func(at, other, table int64) []byte {
		h := make([]byte, SectorSize)
		copy(h, "EFI PART")
		le.PutUint32(h[8:], 0x10000) // revision 1.0
		le.PutUint32(h[12:], 92)     // bytes of the header
		le.PutUint64(h[24:], uint64(at))
		le.PutUint64(h[32:], uint64(other))
		le.PutUint64(h[40:], uint64(firstUsable))
		le.PutUint64(h[48:], uint64(lastUsable))
		copy(h[56:], t.GUID.disk())
		le.PutUint64(h[72:], uint64(table))
		le.PutUint32(h[80:], entries)
		le.PutUint32(h[84:], entrySize)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(list))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		return h
	}
	end := t.Sectors - 1
	head = append(t.mbr(), header(1, end, 2)...)
	head = append(head, list...)
	tail = append(list, header(end, 1, t.Sectors-TableSectors)...)
	return head, tail, nil
}

// mbr is the protective MBR: one partition over the whole disk, so that
// programs that know no GPT take the disk for full.
func (t *Table) mbr() []byte {
	b := make([]byte, SectorSize)
	copy(b, t.MBRCode)
	le := binary.LittleEndian
	e := b[446:]
	copy(e[1:], []byte{0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff})
	le.PutUint32(e[8:], 1)
	le.PutUint32(e[12:], uint32(min(t.Sectors-1, 0xffffffff)))
	b[510], b[511] = 0x55, 0xaa
	return b
}
