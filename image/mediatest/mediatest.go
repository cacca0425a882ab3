// Package mediatest makes small stand-ins for the boot loaders of the boot
// media: they have the headers and marks that the builder looks at, and no
// code.
package mediatest

import "encoding/binary"

var le = binary.LittleEndian

// Stub is an EFI program with one section, .text, room for more, and sections
// aligned to a page.
func Stub() []byte {
	const (
		peAt, optional, headers, page = 0x80, 240, 0x400, 0x1000
	)
	b := make([]byte, headers+0x200)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], peAt)
	copy(b[peAt:], "PE\x00\x00")
	coff := b[peAt+4:]
	le.PutUint16(coff, 0x8664)
	le.PutUint16(coff[2:], 1) // sections
	le.PutUint16(coff[16:], optional)
	le.PutUint16(coff[18:], 0x22)
	opt := coff[20:]
	le.PutUint16(opt, 0x20b)
	le.PutUint32(opt[16:], page)
	le.PutUint32(opt[32:], page)
	le.PutUint32(opt[36:], 0x200)
	le.PutUint32(opt[56:], 2*page)
	le.PutUint32(opt[60:], headers)
	le.PutUint32(opt[64:], 0xbad) // checksum
	le.PutUint16(opt[68:], 10)    // EFI application
	le.PutUint32(opt[108:], 16)
	text := opt[optional:]
	copy(text, ".text")
	for at, v := range map[int]uint32{8: 0x123, 12: page, 16: 0x200, 20: headers, 36: 0x60000020} {
		le.PutUint32(text[at:], v)
	}
	return b
}

// Installer is a program like syslinux's installer, with a boot sector and an
// ldlinux.sys of that many sectors in it.
func Installer(sectors int) []byte {
	const magic = 0x3eb202fe
	boot := make([]byte, 512)
	copy(boot, "\xeb\x58\x90SYSLINUX")
	boot[510], boot[511] = 0x55, 0xaa
	le.PutUint32(boot[0x1f8:], magic)
	image := make([]byte, sectors*512)
	copy(image, "\r\nSYSLINUX 6.04 ")
	le.PutUint32(image[24:], magic)
	le.PutUint16(image[24+22:], 600)
	for i, v := range []uint16{700, 0, 0, 0, 0, 100, 20, 400, 404, 0} {
		le.PutUint16(image[600+2*i:], v)
	}
	return append(append(boot, image...), "\x7fELF\x01\x01\x01"...)
}

// ISOLINUX is an isolinux.bin.
func ISOLINUX() []byte {
	b := make([]byte, 5000)
	le.PutUint32(b[64:], 0x7078c0fb)
	return b
}
