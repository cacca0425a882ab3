// Package elftest makes tiny ELF files for tests: libraries that need others,
// kernel modules that say what they depend on. They cannot be run.
package elftest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

// File describes an ELF file.
type File struct {
	Machine elf.Machine // 0 means x86-64
	Needed  []string    // DT_NEEDED
	RunPath string      // DT_RUNPATH
	Interp  string      // PT_INTERP
	Modinfo []string    // "key=value" strings of a kernel module
}

// Bytes is the file.
func (f File) Bytes() []byte {
	if f.Machine == 0 {
		f.Machine = elf.EM_X86_64
	}
	const headerSize, progSize, sectionSize = 64, 56, 64
	type section struct {
		name string
		typ  elf.SectionType
		link uint32
		data []byte
	}
	strtab := []byte{0}
	str := func(s string) uint64 {
		at := len(strtab)
		strtab = append(append(strtab, s...), 0)
		return uint64(at)
	}
	var dynamic bytes.Buffer
	entry := func(tag elf.DynTag, val uint64) {
		put(&dynamic, elf.Dyn64{Tag: int64(tag), Val: val})
	}
	for _, n := range f.Needed {
		entry(elf.DT_NEEDED, str(n))
	}
	if f.RunPath != "" {
		entry(elf.DT_RUNPATH, str(f.RunPath))
	}
	entry(elf.DT_NULL, 0)
	sections := []section{{}, {".dynstr", elf.SHT_STRTAB, 0, strtab}, {".dynamic", elf.SHT_DYNAMIC, 1, dynamic.Bytes()}}
	if f.Modinfo != nil {
		var info []byte
		for _, s := range f.Modinfo {
			info = append(append(info, s...), 0)
		}
		sections = append(sections, section{".modinfo", elf.SHT_PROGBITS, 0, info})
	}
	names := []byte{0}
	offsets := make([]uint32, len(sections)+1)
	for i, s := range append(sections, section{name: ".shstrtab"}) {
		offsets[i] = uint32(len(names))
		names = append(append(names, s.name...), 0)
	}
	sections = append(sections, section{".shstrtab", elf.SHT_STRTAB, 0, names})

	progs := 0
	if f.Interp != "" {
		progs = 1
	}
	var body bytes.Buffer
	start := uint64(headerSize + progs*progSize)
	interpAt := start
	if f.Interp != "" {
		body.WriteString(f.Interp + "\x00")
	}
	heads := make([]elf.Section64, len(sections))
	for i, s := range sections {
		heads[i] = elf.Section64{Name: offsets[i], Type: uint32(s.typ), Link: s.link, Off: start + uint64(body.Len()), Size: uint64(len(s.data)), Addralign: 1}
		if s.typ == elf.SHT_DYNAMIC {
			heads[i].Entsize = 16
		}
		body.Write(s.data)
	}
	heads[0] = elf.Section64{}

	var out bytes.Buffer
	h := elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(f.Machine), Version: 1, Phoff: headerSize, Shoff: start + uint64(body.Len()),
		Ehsize: headerSize, Phentsize: progSize, Phnum: uint16(progs), Shentsize: sectionSize, Shnum: uint16(len(sections)), Shstrndx: uint16(len(sections) - 1),
	}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	put(&out, h)
	if progs > 0 {
		put(&out, elf.Prog64{Type: uint32(elf.PT_INTERP), Off: interpAt, Filesz: uint64(len(f.Interp) + 1), Memsz: uint64(len(f.Interp) + 1)})
	}
	out.Write(body.Bytes())
	put(&out, heads)
	return out.Bytes()
}

// put writes a value of fixed size into memory, which does not fail.
func put(b *bytes.Buffer, v any) {
	if err := binary.Write(b, binary.LittleEndian, v); err != nil {
		panic(err)
	}
}
