// Command mosagent is the node's program: init of a diskless machine, the
// agent, the shims of its jobs, and the user tools by the name they are called
// with. The verbs are in internal/nodecli.
package main

import (
	"context"
	"os"

	"mosimg/agent/capsule/shim"
	"mosimg/internal/nodecli"
)

func main() {
	// First: a shim is process 1 of a namespace, which otherwise means init.
	if status, ours := shim.Dispatch(os.Args); ours {
		os.Exit(status)
	}
	os.Exit(nodecli.Main(context.Background(), nodecli.OS()))
}
