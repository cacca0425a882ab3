// Package qcow2 writes a disk image in QEMU's qcow2 form, version 3
// (docs/interop/qcow2.txt of QEMU): sparse, uncompressed, without snapshots.
// Clusters of zeros are left out. The bytes depend on the source alone.
package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	clusterBits = 16
	cluster     = 1 << clusterBits
	headerSize  = 104
	perTable    = cluster / 8 // entries of an L1, L2 or refcount table
	perRefcount = cluster / 2 // 16-bit counts in a refcount block
	copied      = 1 << 63     // the cluster's count is exactly one
	// maxSize keeps each of the first tables within what is laid out here.
	maxSize = 1 << 40
)

// Write writes the image of a disk of size bytes, a multiple of 512.
func Write(w io.WriterAt, disk io.ReaderAt, size int64) error {
	if size <= 0 || size%512 != 0 || size > maxSize {
		return fmt.Errorf("a disk of %d bytes", size)
	}
	clusters := (size + cluster - 1) / cluster
	tables := (clusters + perTable - 1) / perTable
	l1Clusters := (tables + perTable - 1) / perTable
	// The counts come right behind the header, with room for the largest
	// case: that nothing is zero.
	blocks, refTables := int64(0), int64(1)
	for total := int64(0); ; {
		total = 1 + refTables + blocks + l1Clusters + tables + clusters
		b := (total + perRefcount - 1) / perRefcount
		r := (b + perTable - 1) / perTable
		if b == blocks && r == refTables {
			break
		}
		blocks, refTables = b, r
	}
	l1At := 1 + refTables + blocks
	l2At := l1At + l1Clusters
	next := l2At + tables

	be := binary.BigEndian
	l2 := make([]byte, tables*cluster)
	buf, zero := make([]byte, cluster), make([]byte, cluster)
	for i := range clusters {
		part := buf[:min(cluster, size-i*cluster)]
		if _, err := disk.ReadAt(part, i*cluster); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if bytes.Equal(part, zero[:len(part)]) {
			continue
		}
		clear(buf[len(part):])
		if _, err := w.WriteAt(buf, next*cluster); err != nil {
			return err
		}
		be.PutUint64(l2[i*8:], uint64(next*cluster)|copied)
		next++
	}

	meta := make([]byte, (l1At+l1Clusters)*cluster)
	copy(meta, "QFI\xfb")
	be.PutUint32(meta[4:], 3)
	be.PutUint32(meta[20:], clusterBits)
	be.PutUint64(meta[24:], uint64(size))
	be.PutUint32(meta[36:], uint32(tables))
	be.PutUint64(meta[40:], uint64(l1At*cluster))
	be.PutUint64(meta[48:], cluster) // the refcount table
	be.PutUint32(meta[56:], uint32(refTables))
	be.PutUint32(meta[96:], 4) // counts have 1<<4 bits
	be.PutUint32(meta[100:], headerSize)
	for i := range blocks {
		be.PutUint64(meta[cluster+i*8:], uint64((1+refTables+i)*cluster))
	}
	counts := meta[(1+refTables)*cluster:]
	for i := range next {
		be.PutUint16(counts[i*2:], 1)
	}
	for i := range tables {
		be.PutUint64(meta[l1At*cluster+i*8:], uint64((l2At+i)*cluster)|copied)
	}
	if _, err := w.WriteAt(meta, 0); err != nil {
		return err
	}
	_, err := w.WriteAt(l2, l2At*cluster)
	return err
}
