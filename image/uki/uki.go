// Package uki makes unified kernel images: one EFI program that holds kernel,
// initramfs and command line. It is systemd's stub with further sections, as
// the UAPI group's specification of UKIs describes them; the stub finds them
// by their names and starts the kernel.
//
// Every section begins on the stub's SectionAlignment, in memory and in the
// file: firmware that protects memory page by page resets the machine when a
// section begins within a page.
package uki

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"errors"
	"fmt"
)

// Section is one section to add.
type Section struct {
	Name string // at most 8 bytes, with its dot: ".linux"
	Data []byte
}

// Offsets in a PE32+ file (Microsoft's "PE Format"), from the optional header.
const (
	optSizeOfInitializedData = 8
	optSizeOfImage           = 56
	optCheckSum              = 64
	sectionHeader            = 40 // bytes of one entry of the section table
	numberOfSections         = 2  // from the COFF header
	certificateTable         = 4  // number of the data directory
	maxImage                 = 1 << 31
	maxAlignment             = 1 << 16 // that of arm64's stub
	// readOnlyData is IMAGE_SCN_CNT_INITIALIZED_DATA and IMAGE_SCN_MEM_READ.
	readOnlyData = 0x40000040
)

// Assemble appends sections to a stub, in their order. The stub may not be
// signed: what is added would break its signature.
func Assemble(stub []byte, sections []Section) ([]byte, error) {
	f, err := pe.NewFile(bytes.NewReader(stub))
	if err != nil {
		return nil, fmt.Errorf("read the stub: %w", err)
	}
	opt, ok := f.OptionalHeader.(*pe.OptionalHeader64)
	if !ok {
		return nil, errors.New("the stub is not a 64-bit EFI program")
	}
	align, inFile := int64(opt.SectionAlignment), int64(opt.FileAlignment)
	switch {
	case align&(align-1) != 0 || inFile&(inFile-1) != 0 || inFile < 1 || align < max(inFile, 512) || align > maxAlignment:
		return nil, fmt.Errorf("the stub's alignments are %d and %d", align, inFile)
	case opt.NumberOfRvaAndSizes > certificateTable && opt.DataDirectory[certificateTable].Size != 0:
		return nil, errors.New("the stub is signed")
	}
	coff := int64(binary.LittleEndian.Uint32(stub[0x3c:])) + 4
	optional := coff + 20
	table := optional + int64(f.SizeOfOptionalHeader)
	memory, room := int64(0), int64(opt.SizeOfHeaders)
	taken := make(map[string]bool)
	for _, s := range f.Sections {
		memory = max(memory, int64(s.VirtualAddress)+int64(s.VirtualSize))
		if s.Offset != 0 {
			room = min(room, int64(s.Offset))
		}
		taken[s.Name] = true
	}
	entry := table + int64(len(f.Sections))*sectionHeader
	if need := entry + int64(len(sections))*sectionHeader; need > room || room > int64(len(stub)) {
		return nil, fmt.Errorf("the stub has no room for %d more sections", len(sections))
	}

	image := bytes.Clone(stub)
	var added int64
	for _, s := range sections {
		switch {
		case len(s.Name) > 8 || s.Name == "" || taken[s.Name]:
			return nil, fmt.Errorf("section %q cannot be added", s.Name)
		case len(s.Data) == 0:
			return nil, fmt.Errorf("section %s is empty", s.Name)
		}
		taken[s.Name] = true
		image = pad(image, align)
		memory = (memory + align - 1) &^ (align - 1)
		raw := alignUp(int64(len(s.Data)), inFile)
		if memory+raw > maxImage || int64(len(image))+raw > maxImage {
			return nil, errors.New("it would be larger than 2 GiB, which no firmware loads")
		}
		header := image[entry : entry+sectionHeader]
		clear(header)
		copy(header, s.Name)
		le := binary.LittleEndian
		le.PutUint32(header[8:], uint32(len(s.Data)))
		le.PutUint32(header[12:], uint32(memory))
		le.PutUint32(header[16:], uint32(raw))
		le.PutUint32(header[20:], uint32(len(image)))
		le.PutUint32(header[36:], readOnlyData)
		image = pad(append(image, s.Data...), inFile)
		memory += int64(len(s.Data))
		entry += sectionHeader
		added += raw
	}
	le := binary.LittleEndian
	le.PutUint16(image[coff+numberOfSections:], uint16(len(f.Sections)+len(sections)))
	le.PutUint32(image[optional+optSizeOfInitializedData:], opt.SizeOfInitializedData+uint32(added))
	le.PutUint32(image[optional+optSizeOfImage:], uint32(alignUp(memory, align)))
	le.PutUint32(image[optional+optCheckSum:], 0) // EFI checks none
	return image, nil
}

func alignUp(n, to int64) int64 {
	return (n + to - 1) / to * to
}

// pad adds zeros up to a multiple of to.
func pad(b []byte, to int64) []byte {
	return append(b, make([]byte, alignUp(int64(len(b)), to)-int64(len(b)))...)
}
