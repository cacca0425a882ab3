// Package media has the test that boots what machines boot without a network:
// the unified kernel image, the disk and the ISO, on a BIOS and on UEFI, each
// in a virtual machine.
package media
