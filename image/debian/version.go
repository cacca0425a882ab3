package debian

import "strings"

// CompareVersions orders two Debian versions: -1 when a is older than b, 0
// when they are equal, 1 when a is newer. The rules are those of Debian
// Policy 5.6.12: [epoch:]upstream[-revision], digits by value, letters before
// other characters, and "~" before everything, even the end.
func CompareVersions(a, b string) int {
	aEpoch, aUp, aRev := splitVersion(a)
	bEpoch, bUp, bRev := splitVersion(b)
	if c := compareDigits(aEpoch, bEpoch); c != 0 {
		return c
	}
	if c := compareParts(aUp, bUp); c != 0 {
		return c
	}
	return compareParts(aRev, bRev)
}

func splitVersion(v string) (epoch, upstream, revision string) {
	epoch, upstream, found := strings.Cut(strings.TrimSpace(v), ":")
	if !found {
		epoch, upstream = "", epoch
	}
	if i := strings.LastIndexByte(upstream, '-'); i >= 0 {
		upstream, revision = upstream[:i], upstream[i+1:]
	}
	return epoch, upstream, revision
}

// compareParts takes turns: a run of non-digits, then a run of digits.
func compareParts(a, b string) int {
	for a != "" || b != "" {
		for (a != "" && !isDigit(a[0])) || (b != "" && !isDigit(b[0])) {
			if c := order(a) - order(b); c != 0 {
				return sign(c)
			}
			a, b = a[1:], b[1:]
		}
		var an, bn string
		an, a = leadingDigits(a)
		bn, b = leadingDigits(b)
		if c := compareDigits(an, bn); c != 0 {
			return c
		}
	}
	return 0
}

// order ranks the first character of s among non-digits. The end of the
// string and a digit rank alike: after "~", before every letter.
func order(s string) int {
	switch {
	case s == "" || isDigit(s[0]):
		return 0
	case s[0] == '~':
		return -1
	case s[0] >= 'a' && s[0] <= 'z', s[0] >= 'A' && s[0] <= 'Z':
		return int(s[0])
	default:
		return int(s[0]) + 256
	}
}

func leadingDigits(s string) (digits, rest string) {
	i := 0
	for i < len(s) && isDigit(s[i]) {
		i++
	}
	return s[:i], s[i:]
}

// compareDigits compares by value without converting: versions such as
// 20250501123456789012 do not fit an integer.
func compareDigits(a, b string) int {
	a, b = strings.TrimLeft(a, "0"), strings.TrimLeft(b, "0")
	if len(a) != len(b) {
		return sign(len(a) - len(b))
	}
	return strings.Compare(a, b)
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func sign(n int) int {
	switch {
	case n < 0:
		return -1
	case n > 0:
		return 1
	}
	return 0
}
