package jobs

import (
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"mosimg/agent/agentapi"
	"mosimg/agent/capsule/control"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// lastSignal is the kernel's highest signal number.
const lastSignal = 64

// checkStart refuses a request that no mosrun makes, all of its faults at once.
func checkStart(req api.JobStart) error {
	var bad fault.List
	if b, err := hex.DecodeString(req.Token); err != nil || len(b) != tokenHex/2 || strings.ToLower(req.Token) != req.Token {
		bad.Addf("token %q: not %d small hex digits", req.Token, tokenHex)
	}
	if len(req.Argv) == 0 || req.Argv[0] == "" {
		bad.Addf("argv: no program is named")
	}
	for name, list := range map[string][]string{"argv": req.Argv, "env": req.Env, "dir": {req.Dir}} {
		if slices.ContainsFunc(list, func(s string) bool { return strings.ContainsRune(s, 0) }) {
			bad.Addf("%s: a zero byte", name)
		}
	}
	if !filepath.IsAbs(req.Dir) {
		bad.Addf("dir %q: not an absolute path", req.Dir)
	}
	if req.Umask < 0 || req.Umask > 0o777 {
		bad.Addf("umask %#o: not 0 to 0777", req.Umask)
	}
	if req.Nice < -20 || req.Nice > 19 {
		bad.Addf("nice %d: not -20 to 19", req.Nice)
	}
	if req.Best && req.Node != "" {
		bad.Addf("node %q: the best one is asked for too", req.Node)
	}
	if req.Bytes < 0 || req.Bytes > 0 && !req.Best {
		bad.Addf("bytes %d: not 0, or more for the best node", req.Bytes)
	}
	for _, sig := range req.Ignored {
		if sig < 1 || sig > lastSignal {
			bad.Addf("ignored signal %d: not 1 to %d", sig, lastSignal)
		}
	}
	for _, l := range req.Limits {
		if l.Cur > l.Max {
			bad.Addf("limit of resource %d: %d is above its own maximum of %d", l.Resource, l.Cur, l.Max)
		}
	}
	return bad.Err(fault.Usage, "start", "job", "is mosrun of another version than the agent?")
}

// specOf is the program that a caller may have run: with what the kernel says
// of the caller, less what the request gives up.
func specOf(req api.JobStart, who agentapi.Caller, f facts) (control.Spec, error) {
	spec := control.Spec{
		Argv: req.Argv, Env: req.Env, Dir: req.Dir, Umask: req.Umask, Nice: req.Nice, Ignored: req.Ignored,
		UID: uint32(who.UID), GID: uint32(who.GID),
		// All that it has: a process cannot drop a group that keeps it out of a file.
		Groups: who.Groups,
		Limits: slices.Clone(f.limits),
	}
	root := who.UID == 0
	var bad fault.List
	for _, g := range req.Groups {
		if g != spec.GID && !slices.Contains(who.Groups, g) {
			bad.Addf("group %d: the caller is not in it", g)
		}
	}
	if req.Nice < f.nice && !root {
		bad.Addf("nice %d: the caller's is %d", req.Nice, f.nice)
	}
	for _, l := range req.Limits {
		i := slices.IndexFunc(spec.Limits, func(own control.Limit) bool { return own.Resource == l.Resource })
		switch {
		case i < 0:
			bad.Addf("limit of resource %d: there is no such resource", l.Resource)
		case l.Max > f.limits[i].Max && !root:
			bad.Addf("limit of resource %d: %d is above the caller's maximum of %d", l.Resource, l.Max, f.limits[i].Max)
		default:
			spec.Limits[i].Cur, spec.Limits[i].Max = l.Cur, l.Max
		}
	}
	return spec, bad.Err(fault.Refused, "start", fmt.Sprintf("job of user %d", who.UID), "a job has at most its caller's rights")
}
