package uki

import (
	"bytes"
	"debug/pe"
	"strings"
	"testing"

	"mosimg/image/mediatest"
)

// Firmware with memory protection resets the machine when a section begins
// within a page, and refuses an image whose size leaves a section out.
func TestAssemble(t *testing.T) {
	sections := []Section{{".osrel", []byte("ID=x\n")}, {".cmdline", []byte("quiet")}, {".linux", bytes.Repeat([]byte("k"), 5000)}, {".initrd", bytes.Repeat([]byte("i"), 4096)}}
	image, err := Assemble(mediatest.Stub(), sections)
	if err != nil {
		t.Fatal(err)
	}
	f, err := pe.NewFile(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	opt := f.OptionalHeader.(*pe.OptionalHeader64)
	if opt.CheckSum != 0 {
		t.Errorf("checksum %#x; want none, for the stub's is wrong now", opt.CheckSum)
	}
	end := uint32(0)
	for _, s := range f.Sections {
		if s.VirtualAddress < end || s.VirtualAddress%opt.SectionAlignment != 0 || s.Offset%opt.FileAlignment != 0 {
			t.Errorf("section %s is at %#x, file %#x, after %#x", s.Name, s.VirtualAddress, s.Offset, end)
		}
		if s.Name != ".text" && s.Offset%opt.SectionAlignment != 0 {
			t.Errorf("section %s is at %#x of the file; want a page", s.Name, s.Offset)
		}
		end = s.VirtualAddress + s.VirtualSize
	}
	if want := (end + 0xfff) &^ 0xfff; opt.SizeOfImage != want {
		t.Errorf("SizeOfImage = %#x; want %#x", opt.SizeOfImage, want)
	}
	for _, want := range sections {
		data, err := f.Section(want.Name).Data()
		if err != nil || !bytes.Equal(data[:len(want.Data)], want.Data) || f.Section(want.Name).VirtualSize != uint32(len(want.Data)) {
			t.Errorf("section %s: %d bytes, %v", want.Name, len(data), err)
		}
	}
}

func TestRefusals(t *testing.T) {
	one := []Section{{".linux", []byte("k")}}
	change := func(at int, b byte) []byte {
		s := mediatest.Stub()
		s[at] = b
		return s
	}
	const optional = 0x80 + 24
	for _, tc := range []struct {
		name     string
		stub     []byte
		sections []Section
		want     string
	}{
		{"not PE", []byte("#!/bin/sh"), one, "read the stub"},
		{"32 bits", change(optional+1, 1), one, "stub"},
		{"alignment of 3", change(optional+32, 3), one, "alignment"},
		{"signed", change(optional+112+4*8+4, 8), one, "signed"},
		{"no room", mediatest.Stub(), make([]Section, 40), "room"},
		{"long name", mediatest.Stub(), []Section{{".initramfs", []byte("k")}}, ".initramfs"},
		{"taken", mediatest.Stub(), []Section{{".text", []byte("k")}}, ".text"},
		{"empty", mediatest.Stub(), []Section{{".linux", nil}}, "empty"},
	} {
		if _, err := Assemble(tc.stub, tc.sections); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: Assemble = %v; want %q", tc.name, err, tc.want)
		}
	}
}

func FuzzAssemble(f *testing.F) {
	f.Add(mediatest.Stub())
	f.Fuzz(func(t *testing.T, stub []byte) {
		image, err := Assemble(stub, []Section{{".linux", []byte("kernel")}, {".initrd", []byte("initrd")}})
		if err != nil {
			return
		}
		p, err := pe.NewFile(bytes.NewReader(image))
		if err != nil {
			t.Fatalf("what Assemble made cannot be read: %v", err)
		}
		data, err := p.Section(".linux").Data()
		if err != nil || !bytes.HasPrefix(data, []byte("kernel")) {
			t.Errorf(".linux = %.10q, %v", data, err)
		}
	})
}
