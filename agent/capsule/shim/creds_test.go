package shim

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"google.golang.org/protobuf/proto"

	"mosimg/agent/capsule/control"
)

// coreImage is the image of a process of user 1000, changed by f.
func coreImage(f func(*core.ThreadCoreEntry)) []byte {
	tc := &core.ThreadCoreEntry{
		FutexRla: proto.Uint64(0), FutexRlaLen: proto.Uint32(0), SeccompMode: core.SeccompMode_filter.Enum(),
		Creds: &creds.CredsEntry{
			Uid: proto.Uint32(1000), Euid: proto.Uint32(1000), Suid: proto.Uint32(1000), Fsuid: proto.Uint32(1000),
			Gid: proto.Uint32(100), Egid: proto.Uint32(100), Sgid: proto.Uint32(100), Fsgid: proto.Uint32(100),
			CapInh: []uint32{0, 0}, CapPrm: []uint32{0, 0}, CapEff: []uint32{0, 0}, CapBnd: []uint32{1, 0},
			Secbits: proto.Uint32(0), Groups: []uint32{24},
		},
	}
	f(tc)
	return coreOf(1, tc)
}

// coreOf is the image of a process in a state, of whose thread there is tc.
func coreOf(state uint32, tc *core.ThreadCoreEntry) []byte {
	body, err := proto.MarshalOptions{AllowPartial: true}.Marshal(&core.CoreEntry{Mtype: core.CoreEntry_X86_64.Enum(), ThreadCore: tc, Tc: &core.TaskCoreEntry{
		TaskState: proto.Uint32(state), ExitCode: proto.Uint32(0), Personality: proto.Uint32(0), Flags: proto.Uint32(0), BlkSigset: proto.Uint64(0), Comm: proto.String("x"),
	}})
	if err != nil {
		panic(err)
	}
	var b []byte
	for _, v := range []uint32{imgCommonMagic, coreMagic, uint32(len(body))} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return append(b, body...)
}

// A node that had a job cannot send back one that is root here.
func TestForgedImageIsRefused(t *testing.T) {
	owner := control.Owner{UID: 1000, GID: 100, Groups: []uint32{24, 27}}
	for want, f := range map[string]func(*core.ThreadCoreEntry){
		"":                    func(*core.ThreadCoreEntry) {},
		"rights of user 0":    func(c *core.ThreadCoreEntry) { c.Creds.Fsuid = proto.Uint32(0) },
		"rights of user 1001": func(c *core.ThreadCoreEntry) { c.Creds.Suid = proto.Uint32(1001) },
		"group 0;":            func(c *core.ThreadCoreEntry) { c.Creds.Groups = append(c.Creds.Groups, 0) },
		"group 42":            func(c *core.ThreadCoreEntry) { c.Creds.Egid = proto.Uint32(42) },
		"capabilities":        func(c *core.ThreadCoreEntry) { c.Creds.CapPrm[1] = 1 },
		"no credentials":      func(c *core.ThreadCoreEntry) { c.Creds = nil },
		"filter":              func(c *core.ThreadCoreEntry) { c.SeccompMode = core.SeccompMode_disabled.Enum() },
		"filter of":           func(c *core.ThreadCoreEntry) { c.SeccompMode = nil },
	} {
		err := checkCore(coreImage(f), owner)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("checkCore = %v; want %q", err, want)
		}
	}
}

// A program need not wait for its children at once: a job with a zombie moves.
// But what only says that it is one is checked.
func TestZombieHasNoCredentials(t *testing.T) {
	owner := control.Owner{UID: 1000}
	if err := checkCore(coreOf(taskDead, nil), owner); err != nil {
		t.Errorf("checkCore(zombie) = %v", err)
	}
	if err := checkCore(coreOf(1, nil), owner); err == nil {
		t.Error("checkCore passes a living process without credentials")
	}
	if err := checkCore(coreOf(taskDead, &core.ThreadCoreEntry{}), owner); err == nil {
		t.Error("checkCore passes a zombie that has a thread without credentials")
	}
}

func FuzzCheckCore(f *testing.F) {
	f.Add(coreImage(func(*core.ThreadCoreEntry) {}))
	f.Fuzz(func(_ *testing.T, data []byte) { checkCore(data, control.Owner{UID: 1000}) }) //nolint:errcheck // it must not panic
}
