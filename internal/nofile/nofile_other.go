//go:build !amd64 && !386 && !arm64

package nofile

const sysPrlimit64 = 0 // unknown: the limit is not
