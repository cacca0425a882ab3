// Package zstdframe finds where a zstd frame ends, which a decoder does not
// tell: an initramfs has several parts in a row, with padding between.
package zstdframe

import "github.com/klauspost/compress/zstd"

// Length is the length of the zstd frame at the beginning of b, or 0 when
// there is no whole one (RFC 8878 section 3.1.1).
func Length(b []byte) int {
	var h zstd.Header
	if h.Decode(b) != nil || h.Skippable {
		return 0
	}
	at := h.HeaderSize
	for {
		if at+3 > len(b) {
			return 0
		}
		block := uint32(b[at]) | uint32(b[at+1])<<8 | uint32(b[at+2])<<16
		last, kind, size := block&1 == 1, block>>1&3, int(block>>3)
		at += 3
		switch kind {
		case 1: // one byte, repeated
			at++
		case 3: // reserved
			return 0
		default:
			at += size
		}
		if at > len(b) {
			return 0
		}
		if last {
			break
		}
	}
	if h.HasCheckSum {
		at += 4
	}
	if at > len(b) {
		return 0
	}
	return at
}
