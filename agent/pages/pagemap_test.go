package pages

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"google.golang.org/protobuf/proto"
)

// parsePagemap reads a pagemap image: the number of its pages file, and its runs.
func parsePagemap(t *testing.T, root *os.Root, name string) (pages uint32, runs []run) {
	t.Helper()
	data, err := root.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) < 8 || binary.LittleEndian.Uint32(data) != magicCommon || binary.LittleEndian.Uint32(data[4:]) != magicPagemap {
		t.Fatalf("%s begins with % x", name, data[:min(8, len(data))])
	}
	data = data[8:]
	next := func(m proto.Message) {
		n := binary.LittleEndian.Uint32(data)
		if err := proto.Unmarshal(data[4:4+n], m); err != nil {
			t.Fatal(err)
		}
		data = data[4+n:]
	}
	var head pagemap.PagemapHead
	next(&head)
	for len(data) > 0 {
		var e pagemap.PagemapEntry
		next(&e)
		if e.GetFlags() != flagPresent {
			t.Errorf("%s: flags %#x", name, e.GetFlags())
		}
		runs = append(runs, run{e.GetVaddr(), e.GetNrPages()})
	}
	return head.GetPagesId(), runs
}
