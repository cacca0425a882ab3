package debian

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"mosimg/internal/fault"
)

// DefaultKeyring is where the package debian-archive-keyring puts its keys.
const DefaultKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// Release is a verified InRelease file: the hashes of a suite's indexes.
type Release struct {
	Suite, Codename string
	Date            time.Time
	ValidUntil      time.Time // zero when the suite has none
	ByHash          bool      // indexes can be fetched by hash
	Files           map[string]IndexFile
	Signer          string // key id of the signature that verified
}

// IndexFile is one entry of a Release's SHA256 list.
type IndexFile struct {
	Size   int64
	SHA256 string
}

// LoadKeyring reads an OpenPGP keyring, binary or armoured.
func LoadKeyring(path string) (openpgp.EntityList, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		kind, hint := fault.Usage, "name another with --keyring"
		if path == DefaultKeyring {
			kind, hint = fault.Environment, "install the package debian-archive-keyring, or name a keyring with --keyring"
		}
		return nil, fault.New(kind, "read keyring", path, errors.Unwrap(err), hint)
	}
	read := openpgp.ReadKeyRing
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("-----BEGIN")) {
		read = openpgp.ReadArmoredKeyRing
	}
	keys, err := read(bytes.NewReader(data))
	if err != nil {
		return nil, fault.New(fault.Usage, "read keyring", path, err, "it must hold OpenPGP public keys")
	}
	return keys, nil
}

// ParseInRelease verifies the signature of an InRelease file and reads it.
// Only what the signature covers is looked at. suite must be its Suite or its
// Codename, and now must lie before its Valid-Until.
func ParseInRelease(data []byte, keys openpgp.KeyRing, suite string, now time.Time) (*Release, error) {
	untrusted := func(cause any, hint string) error {
		return fault.New(fault.Untrusted, "verify index of suite", suite, cause, hint)
	}
	block, _ := clearsign.Decode(data)
	if block == nil {
		return nil, untrusted("InRelease is not a clear-signed file", "another --mirror may help")
	}
	signer, err := verify(block, keys, now)
	if err != nil {
		return nil, untrusted(fmt.Sprintf("bad signature: %v", err), signatureHint(err, now))
	}
	r, err := parseRelease(block.Plaintext)
	if err != nil {
		return nil, untrusted(err, "another --mirror may help")
	}
	r.Signer = fmt.Sprintf("%X", signer.PrimaryKey.KeyId)
	if r.Suite != suite && r.Codename != suite {
		return nil, untrusted(fmt.Sprintf("InRelease is for suite %q, codename %q", r.Suite, r.Codename), "the mirror mixes suites up; try another --mirror")
	}
	if !r.ValidUntil.IsZero() && now.After(r.ValidUntil) {
		return nil, untrusted(fmt.Sprintf("the index expired on %s", r.ValidUntil.Format(time.RFC3339)),
			fmt.Sprintf("the mirror is stale, or this machine's clock (%s) is wrong", now.UTC().Format(time.RFC3339)))
	}
	return r, nil
}

// verify accepts the block when one of its signatures is good. Debian signs
// with the keys of two releases and a third for point releases; a keyring may
// know only some of them, and one of those may have expired.
func verify(block *clearsign.Block, keys openpgp.KeyRing, now time.Time) (*openpgp.Entity, error) {
	config := &packet.Config{Time: func() time.Time { return now }}
	best := pgperrors.ErrUnknownIssuer
	signatures := packet.NewOpaqueReader(block.ArmoredSignature.Body)
	for {
		p, err := signatures.Next()
		if errors.Is(err, io.EOF) {
			return nil, best
		}
		if err != nil {
			return nil, err
		}
		var one bytes.Buffer
		if err := p.Serialize(&one); err != nil {
			return nil, err
		}
		_, signer, err := openpgp.VerifyDetachedSignature(keys, bytes.NewReader(block.Bytes), &one, config)
		if err == nil {
			return signer, nil
		}
		if !errors.Is(err, pgperrors.ErrUnknownIssuer) {
			best = err
		}
	}
}

func signatureHint(err error, now time.Time) string {
	if errors.Is(err, pgperrors.ErrSignatureExpired) || errors.Is(err, pgperrors.ErrKeyExpired) {
		return fmt.Sprintf("is this machine's clock right? it says %s", now.UTC().Format(time.RFC3339))
	}
	return "wrong --keyring, or the mirror was tampered with"
}

func parseRelease(text []byte) (*Release, error) {
	r := &Release{Files: make(map[string]IndexFile)}
	var fields Paragraph
	err := ReadControl(bytes.NewReader(text), func(p Paragraph) error {
		if fields != nil {
			return errors.New("InRelease has more than one paragraph")
		}
		fields = append(Paragraph{}, p...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	r.Suite, r.Codename = fields.Get("Suite"), fields.Get("Codename")
	r.ByHash = fields.Get("Acquire-By-Hash") == "yes"
	if r.Date, err = parseDate(fields.Get("Date")); err != nil {
		return nil, fmt.Errorf("Date: %w", err)
	}
	if v := fields.Get("Valid-Until"); v != "" {
		if r.ValidUntil, err = parseDate(v); err != nil {
			return nil, fmt.Errorf("Valid-Until: %w", err)
		}
	}
	for line := range strings.Lines(fields.Get("SHA256")) {
		w := strings.Fields(line)
		if len(w) == 0 {
			continue
		}
		if len(w) != 3 {
			return nil, fmt.Errorf("SHA256 line %.80q has not three words", line)
		}
		size, err := strconv.ParseInt(w[1], 10, 64)
		if sum, herr := hex.DecodeString(w[0]); herr != nil || len(sum) != 32 || err != nil || size < 0 {
			return nil, fmt.Errorf("SHA256 line %.80q is not a hash, a size and a name", line)
		}
		r.Files[w[2]] = IndexFile{Size: size, SHA256: w[0]}
	}
	if len(r.Files) == 0 {
		return nil, errors.New("InRelease lists no SHA256 hashes")
	}
	return r, nil
}

// parseDate reads the date of a Release file; archives write UTC, GMT or +0000.
func parseDate(s string) (time.Time, error) {
	for _, layout := range []string{time.RFC1123, time.RFC1123Z, "Mon, _2 Jan 2006 15:04:05 MST", "Mon, _2 Jan 2006 15:04:05 -0700"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is not a date", s)
}
