// Package version names this build of mosimg.
package version

import "runtime/debug"

// Protocol is the version of the API between head, agents and tools. A peer
// with another number is refused with both numbers in the message.
const Protocol = 1

// Release is set by the linker in release builds.
var Release = "dev"

// String is the release with the VCS revision when the build recorded one.
func String() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return Release
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return Release + "-" + s.Value[:12]
		}
	}
	return Release
}
