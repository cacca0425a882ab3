package criu

import (
	"bytes"
	"encoding/binary"
	"os"
)

// The probe's child is an ELF file that we write ourselves: smaller than any
// program in the image, static, and with a way to see that it runs again. It
// loops until it has renamed "go" to "done" in its working directory:
//
//	loop: nanosleep({0, 10ms}); if rename("go", "done") != 0 goto loop; exit(0)
//
// So one dumped and restored continues in the middle of that loop, and proves
// it by the file that appears.
const (
	goFile   = "go"
	doneFile = "done"
)

// loadAddr is where the file is mapped; the code follows the ELF headers.
const loadAddr = 0x400000

var childData = append(binary.LittleEndian.AppendUint64(make([]byte, 8), 10_000_000), goFile+"\x00"+doneFile+"\x00"...)

// writeChild64 writes the child for x86-64.
func writeChild64(path string) error {
	code := []byte{
		0xb8, 35, 0, 0, 0, // mov $SYS_nanosleep, %eax
		0x48, 0x8d, 0x3d, 0x26, 0, 0, 0, // lea ts(%rip), %rdi
		0x31, 0xf6, // xor %esi, %esi
		0x0f, 0x05, // syscall
		0xb8, 82, 0, 0, 0, // mov $SYS_rename, %eax
		0x48, 0x8d, 0x3d, 0x26, 0, 0, 0, // lea go(%rip), %rdi
		0x48, 0x8d, 0x35, 0x22, 0, 0, 0, // lea done(%rip), %rsi
		0x0f, 0x05, // syscall
		0x85, 0xc0, // test %eax, %eax
		0x75, 0xd7, // jne loop
		0xb8, 60, 0, 0, 0, // mov $SYS_exit, %eax
		0x31, 0xff, // xor %edi, %edi
		0x0f, 0x05, // syscall
	}
	const header = 64 + 56
	size := uint64(header + len(code) + len(childData))
	var b bytes.Buffer
	w := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) } // a Buffer takes all
	b.WriteString("\x7fELF\x02\x01\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	w([]uint16{2, 62}) // ET_EXEC, EM_X86_64
	w(uint32(1))
	w([]uint64{loadAddr + header, 64, 0}) // entry, program headers, sections
	w(uint32(0))
	w([]uint16{64, 56, 1, 0, 0, 0})
	w([]uint32{1, 5}) // PT_LOAD, read and execute
	w([]uint64{0, loadAddr, loadAddr, size, size, 0x1000})
	b.Write(code)
	b.Write(childData)
	return os.WriteFile(path, b.Bytes(), 0o700)
}

// writeChild32 writes the child for i386.
func writeChild32(path string) error {
	const header = 52 + 32
	const codeLen = 0x2c
	data := uint32(loadAddr + header + codeLen)
	abs := func(op byte, offset uint32) []byte {
		return binary.LittleEndian.AppendUint32([]byte{op}, data+offset)
	}
	code := bytes.Join([][]byte{
		{0xb8, 162, 0, 0, 0}, // mov $SYS_nanosleep, %eax
		abs(0xbb, 4),         // mov $ts, %ebx: the second half of its 64-bit zero, then the nanoseconds
		{0x31, 0xc9},         // xor %ecx, %ecx
		{0xcd, 0x80},         // int $0x80
		{0xb8, 38, 0, 0, 0},  // mov $SYS_rename, %eax
		abs(0xbb, 16),        // mov $go, %ebx
		abs(0xb9, 19),        // mov $done, %ecx
		{0xcd, 0x80},         // int $0x80
		{0x85, 0xc0},         // test %eax, %eax
		{0x75, 0xdd},         // jne loop
		{0xb8, 1, 0, 0, 0},   // mov $SYS_exit, %eax
		{0x31, 0xdb},         // xor %ebx, %ebx
		{0xcd, 0x80},         // int $0x80
	}, nil)
	size := uint32(header + len(code) + len(childData))
	var b bytes.Buffer
	w := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) } // a Buffer takes all
	b.WriteString("\x7fELF\x01\x01\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	w([]uint16{2, 3})                           // ET_EXEC, EM_386
	w([]uint32{1, loadAddr + header, 52, 0, 0}) // version, entry, program headers, sections, flags
	w([]uint16{52, 32, 1, 0, 0, 0})             //
	w([]uint32{1, 0, loadAddr, loadAddr, size, size, 5, 0x1000})
	b.Write(code)
	b.Write(childData)
	return os.WriteFile(path, b.Bytes(), 0o700)
}
