package leader

import (
	"bytes"
	"encoding/binary"
)

// elf wraps text into a static executable of one segment (System V ABI,
// Intel386 supplement).
func elf(text []byte) []byte {
	const header = 52 + 32
	size := uint32(header + len(text))
	var b bytes.Buffer
	w := func(v any) { binary.Write(&b, binary.LittleEndian, v) } //nolint:errcheck // a buffer takes all
	b.WriteString("\x7fELF\x01\x01\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	w([]uint16{2, 3})                           // ET_EXEC, EM_386
	w([]uint32{1, loadAddr + header, 52, 0, 0}) // version, entry, program headers, sections, flags
	w([]uint16{52, 32, 1, 0, 0, 0})
	w([]uint32{1, 0, loadAddr, loadAddr, size, size, 5, 0x1000})
	b.Write(text)
	return b.Bytes()
}
