package debian

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func readAll(t *testing.T, text string) ([]Paragraph, error) {
	t.Helper()
	var out []Paragraph
	err := ReadControl(strings.NewReader(text), func(p Paragraph) error {
		out = append(out, append(Paragraph(nil), p...))
		return nil
	})
	return out, err
}

func TestReadControl(t *testing.T) {
	got, err := readAll(t, "\n\nPackage: a\r\nDepends: b,\n c\n\td\n# a comment\nSize: 1\n\n \n\nPackage: b\nEmpty:\n x\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []Paragraph{
		{{"Package", "a"}, {"Depends", "b,\nc\nd"}, {"Size", "1"}},
		{{"Package", "b"}, {"Empty", "\nx"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ReadControl (-want +got):\n%s", diff)
	}
	if v := got[0].Get("dePENDs"); v != "b,\nc\nd" {
		t.Errorf("Get ignores case: got %q", v)
	}
}

// A mirror's captive portal answers with HTML; that must be an error with a
// line number, not an empty index.
func TestReadControlRefuses(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"<html>\n", "line 1"},
		{"A: b\nno colon here\n", "line 2"},
		{" continued\n", "line 1"},
		{"A b: c\n", "line 1"},
		{": c\n", "line 1"},
		{"A: " + strings.Repeat("x", maxLine+1), "line 1 has more than"},
	} {
		if _, err := readAll(t, tc.text); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("ReadControl(%.20q) = %v; want an error with %q", tc.text, err, tc.want)
		}
	}
}

func FuzzReadControl(f *testing.F) {
	f.Add("Package: a\nDepends: b\n c\n\nPackage: d\n")
	f.Add("# c\n a\n:")
	f.Fuzz(func(t *testing.T, text string) {
		_ = ReadControl(strings.NewReader(text), func(p Paragraph) error {
			if len(p) == 0 {
				t.Error("empty paragraph reported")
			}
			for _, field := range p {
				if field.Name == "" || strings.HasPrefix(field.Value, " ") {
					t.Errorf("bad field %q", field)
				}
			}
			return nil
		})
	})
}
