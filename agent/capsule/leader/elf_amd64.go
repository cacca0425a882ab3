package leader

import (
	"bytes"
	"encoding/binary"
)

// elf wraps text into a static executable of one segment (ELF-64 object file
// format, version 1.5).
func elf(text []byte) []byte {
	const header = 64 + 56
	size := uint64(header + len(text))
	var b bytes.Buffer
	w := func(v any) { binary.Write(&b, binary.LittleEndian, v) } //nolint:errcheck // a buffer takes all
	b.WriteString("\x7fELF\x02\x01\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	w([]uint16{2, 62}) // ET_EXEC, EM_X86_64
	w(uint32(1))
	w([]uint64{loadAddr + header, 64, 0}) // entry, program headers, sections
	w(uint32(0))
	w([]uint16{64, 56, 1, 0, 0, 0})
	w([]uint32{1, 5}) // PT_LOAD, read and execute
	w([]uint64{0, loadAddr, loadAddr, size, size, 0x1000})
	b.Write(text)
	return b.Bytes()
}
