package image

import (
	"os"
	"strings"
	"testing"

	"mosimg/image/profile"
)

// A utility that go.mod of initramfs/uroot does not pin would make the build
// fail, or take another version than the one that was tested.
func TestUtilitiesOfProfilesArePinned(t *testing.T) {
	pinned, err := os.ReadFile("../initramfs/uroot/commands.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range profile.Names() {
		p, err := profile.Load(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range p.Utilities {
			if !strings.Contains(string(pinned), "cmds/core/"+u+"\"") {
				t.Errorf("profile %s has the utility %s, which initramfs/uroot/commands.go does not import", name, u)
			}
		}
	}
}
