// Package fat writes FAT32 file systems: once, whole, from files in memory.
//
// Every file is one run of clusters that begins on a multiple of Align bytes
// of the volume, so that others may point into it (the ISO's files lie inside
// the EFI partition). Names are 8.3 in capitals: what boots a machine needs
// no others. The bytes depend on the arguments alone.
//
// docs/outputs.md says why this is not go-diskfs: fsck.fat finds faults in
// every FAT32 that it makes.
package fat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	sectorSize = 512
	// reserved sectors at the beginning: boot sector, FSInfo, and the copy
	// of both at backupAt.
	reserved = 32
	infoAt   = 1
	backupAt = 6
	numFATs  = 2
	// minClusters is where FAT32 begins: by their number alone is told what
	// a FAT is (Microsoft, "FAT: General Overview", FAT type determination).
	minClusters = 65525
	maxClusters = 1 << 28 // minus a few, which nobody gets near to
	media       = 0xf8
	endOfChain  = 0x0fffffff
	dirEntry    = 32

	// Align is what the place of each file is a multiple of: a block of an
	// ISO and a page.
	Align = 4096
)

// File is one file; folders above it are made.
type File struct {
	Name string // "EFI/BOOT/BOOTX64.EFI"
	Data []byte
	// System marks a file that is not to be moved, with the attributes that
	// tell defragmenters so.
	System bool
}

// Options are what a volume is made of.
type Options struct {
	Label string // at most 11 capitals, digits and dashes
	ID    uint32 // serial number of the volume
	Time  time.Time
	Files []File
	// Free is how many bytes are to be free at least.
	Free int64
	// Hidden is the number of sectors before the volume on its disk.
	Hidden uint32
}

// Volume is a file system that is ready to be written.
type Volume struct {
	o          Options
	perCluster int64 // sectors
	fatSectors int64
	clusters   int64
	root       *node
	next       int64  // first cluster that is not in use
	boot       []byte // code for the boot sector
}

// node is a file or folder with its place.
type node struct {
	name     string // 8.3, "" is the root
	file     *File  // nil for a folder
	children []*node
	parent   *node
	cluster  int64 // first one; 0 for an empty file
	count    int64 // clusters
}

var (
	labelForm = regexp.MustCompile(`^[A-Z0-9-]{1,11}$`)
	nameForm  = regexp.MustCompile(`^[A-Z0-9_-]{1,8}(\.[A-Z0-9_-]{1,3})?$`)
)

// New lays a volume out.
func New(o Options) (*Volume, error) {
	if !labelForm.MatchString(o.Label) {
		return nil, fmt.Errorf("volume label %q is not 1 to 11 capitals, digits and dashes", o.Label)
	}
	v := &Volume{o: o, root: &node{}}
	for i := range o.Files {
		if err := v.insert(&o.Files[i]); err != nil {
			return nil, err
		}
	}
	for v.perCluster = 1; ; v.perCluster *= 2 {
		if v.perCluster > 64 {
			return nil, errors.New("its files are too large for a FAT32")
		}
		if v.lay() {
			return v, nil
		}
	}
}

func (v *Volume) insert(f *File) error {
	if int64(len(f.Data)) > 1<<32-1 {
		return fmt.Errorf("%s has more than 4 GiB", f.Name)
	}
	at := v.root
	parts := strings.Split(f.Name, "/")
	for i, name := range parts {
		if !nameForm.MatchString(name) {
			return fmt.Errorf("file name %q is not of the form 8.3 in capitals", f.Name)
		}
		last := i == len(parts)-1
		j := slices.IndexFunc(at.children, func(n *node) bool { return n.name == name })
		switch {
		case j >= 0 && (last || at.children[j].file != nil):
			return fmt.Errorf("%s is there twice", f.Name)
		case j >= 0:
			at = at.children[j]
			continue
		}
		n := &node{name: name, parent: at}
		if last {
			n.file = f
		}
		at.children = append(at.children, n)
		at = n
	}
	return nil
}

// lay gives everything its place with the present size of clusters; false
// when there would be too many of them.
func (v *Volume) lay() bool {
	size := v.perCluster * sectorSize
	// Every place is known but for where the clusters begin, which depends
	// on their number: so it is looked for from a first guess.
	for clusters := int64(minClusters + 16); ; {
		if clusters > 1<<19 && v.perCluster < 64 || clusters >= maxClusters-16 {
			return false // ever more clusters make the tables large: take larger ones
		}
		v.clusters = clusters
		v.fatSectors = (4*(clusters+2) + sectorSize - 1) / sectorSize
		// The clusters begin on a multiple of Align too.
		for (reserved+numFATs*v.fatSectors)*sectorSize%Align != 0 {
			v.fatSectors++
		}
		v.next = 2
		v.walk(v.root, func(n *node) {
			length := int64(len(n.children)+3) * dirEntry // two dots and the label
			if n.file != nil {
				length = int64(len(n.file.Data))
				for length > 0 && (v.next-2)*size%Align != 0 {
					v.next++
				}
			}
			n.count = (length + size - 1) / size
			n.cluster = 0
			if n.count > 0 {
				n.cluster = v.next
			}
			v.next += n.count
		})
		need := v.next - 2 + (v.o.Free+size-1)/size
		if need <= clusters {
			return true
		}
		clusters = need
	}
}

// walk visits folders before what is in them.
func (v *Volume) walk(n *node, visit func(*node)) {
	visit(n)
	for _, c := range n.children {
		v.walk(c, visit)
	}
}

// Size is the number of bytes of the volume.
func (v *Volume) Size() int64 { return v.sectorOf(v.clusters+2) * sectorSize }

// sectorOf is where a cluster begins.
func (v *Volume) sectorOf(cluster int64) int64 {
	return reserved + numFATs*v.fatSectors + (cluster-2)*v.perCluster
}

// Offset is where a file's bytes begin in the volume, and whether it is there
// and has any.
func (v *Volume) Offset(name string) (int64, bool) {
	var at int64
	v.walk(v.root, func(n *node) {
		if n.file != nil && n.file.Name == name && n.cluster != 0 {
			at = v.sectorOf(n.cluster) * sectorSize
		}
	})
	return at, at != 0
}

// BootCodeAt is where a FAT32 boot sector has its code, after the jump and
// the name of what made it, and the parameters.
const BootCodeAt = 90

// SetBootCode puts a boot sector's code, jump and name into the volume; its
// parameters stay the volume's.
func (v *Volume) SetBootCode(sector []byte) error {
	if len(sector) != sectorSize || sector[510] != 0x55 || sector[511] != 0xaa {
		return errors.New("this is not a boot sector")
	}
	v.boot = bytes.Clone(sector)
	return nil
}

// WriteTo writes the volume to w, its first byte at base. What it does not
// write must be zero there already.
func (v *Volume) WriteTo(w io.WriterAt, base int64) error {
	write := func(sector int64, data []byte) error {
		_, err := w.WriteAt(data, base+sector*sectorSize)
		return err
	}
	for _, at := range []int64{0, backupAt} {
		if err := errors.Join(write(at, v.bootSector()), write(at+infoAt, v.info())); err != nil {
			return err
		}
	}
	table := v.table()
	for i := range int64(numFATs) {
		if err := write(reserved+i*v.fatSectors, table); err != nil {
			return err
		}
	}
	var err error
	v.walk(v.root, func(n *node) {
		switch {
		case err != nil || n.count == 0:
		case n.file != nil:
			err = write(v.sectorOf(n.cluster), n.file.Data)
		default:
			err = write(v.sectorOf(n.cluster), v.folder(n))
		}
	})
	return err
}

func (v *Volume) bootSector() []byte {
	b := make([]byte, sectorSize)
	copy(b, "\xeb\x58\x90MOSIMG  ")
	if v.boot != nil {
		copy(b, v.boot)
		clear(b[11:BootCodeAt])
	} else {
		copy(b[BootCodeAt:], "\xcd\x18\xeb\xfe") // int 18h: the BIOS may try the next disk
	}
	le := binary.LittleEndian
	le.PutUint16(b[11:], sectorSize)
	b[13] = byte(v.perCluster)
	le.PutUint16(b[14:], reserved)
	b[16] = numFATs
	b[21] = media
	le.PutUint16(b[24:], 63) // sectors and heads of a BIOS's geometry
	le.PutUint16(b[26:], 255)
	le.PutUint32(b[28:], v.o.Hidden)
	le.PutUint32(b[32:], uint32(v.Size()/sectorSize))
	le.PutUint32(b[36:], uint32(v.fatSectors))
	le.PutUint32(b[44:], 2) // the root folder's cluster
	le.PutUint16(b[48:], infoAt)
	le.PutUint16(b[50:], backupAt)
	b[64] = 0x80 // the BIOS's number of the first hard disk
	b[66] = 0x29 // serial number, label and type follow
	le.PutUint32(b[67:], v.o.ID)
	copy(b[71:], fmt.Sprintf("%-11s%-8s", v.o.Label, "FAT32"))
	b[510], b[511] = 0x55, 0xaa
	return b
}

func (v *Volume) info() []byte {
	b := make([]byte, sectorSize)
	le := binary.LittleEndian
	copy(b, "RRaA")
	copy(b[484:], "rrAa")
	var used int64
	v.walk(v.root, func(n *node) { used += n.count })
	le.PutUint32(b[488:], uint32(v.clusters-used))
	le.PutUint32(b[492:], uint32(v.next))
	b[510], b[511] = 0x55, 0xaa
	return b
}

func (v *Volume) table() []byte {
	b := make([]byte, v.fatSectors*sectorSize)
	le := binary.LittleEndian
	le.PutUint32(b, 0x0fffff00|media)
	le.PutUint32(b[4:], endOfChain)
	v.walk(v.root, func(n *node) {
		for i := range n.count {
			value := uint32(n.cluster + i + 1)
			if i == n.count-1 {
				value = endOfChain
			}
			le.PutUint32(b[4*(n.cluster+i):], value)
		}
	})
	return b
}

const (
	attrReadOnly  = 0x01
	attrHidden    = 0x02
	attrSystem    = 0x04
	attrLabel     = 0x08
	attrDirectory = 0x10
	attrArchive   = 0x20
)

func (v *Volume) folder(n *node) []byte {
	b := make([]byte, 0, n.count*v.perCluster*sectorSize)
	if n == v.root {
		b = append(b, v.entry(fmt.Sprintf("%-11s", v.o.Label), attrLabel, 0, 0)...)
	} else {
		up := n.parent.cluster
		if n.parent == v.root {
			up = 0 // as the specification wants it
		}
		b = append(b, v.entry(".          ", attrDirectory, n.cluster, 0)...)
		b = append(b, v.entry("..         ", attrDirectory, up, 0)...)
	}
	for _, c := range n.children {
		ext := path.Ext(c.name)
		name := fmt.Sprintf("%-8s%-3s", strings.TrimSuffix(c.name, ext), strings.TrimPrefix(ext, "."))
		switch {
		case c.file == nil:
			b = append(b, v.entry(name, attrDirectory, c.cluster, 0)...)
		case c.file.System:
			b = append(b, v.entry(name, attrReadOnly|attrHidden|attrSystem, c.cluster, len(c.file.Data))...)
		default:
			b = append(b, v.entry(name, attrArchive, c.cluster, len(c.file.Data))...)
		}
	}
	return b[:cap(b)]
}

func (v *Volume) entry(name string, attr byte, cluster int64, size int) []byte {
	b := make([]byte, dirEntry)
	copy(b, name)
	b[11] = attr
	date, clock := stamp(v.o.Time)
	le := binary.LittleEndian
	le.PutUint16(b[14:], clock)
	le.PutUint16(b[16:], date)
	le.PutUint16(b[18:], date)
	le.PutUint16(b[20:], uint16(cluster>>16))
	le.PutUint16(b[22:], clock)
	le.PutUint16(b[24:], date)
	le.PutUint16(b[26:], uint16(cluster))
	le.PutUint32(b[28:], uint32(size))
	return b
}

// stamp is a time in FAT's form, which has the years 1980 to 2107 in steps of
// two seconds.
func stamp(t time.Time) (date, clock uint16) {
	t = t.UTC()
	if t.Year() < 1980 {
		t = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)
	} else if t.Year() > 2107 {
		t = time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)
	}
	return uint16((t.Year()-1980)<<9 | int(t.Month())<<5 | t.Day()), uint16(t.Hour()<<11 | t.Minute()<<5 | t.Second()/2)
}
