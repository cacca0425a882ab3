// Command mosimg is the operator's tool: build an image, run a head, look
// after nodes, start a lab. The verbs are in internal/cli.
package main

import (
	"context"
	"os"

	"mosimg/agent/capsule/shim"
	"mosimg/internal/cli"
)

func main() {
	// mosimg bench migrate makes capsules, and their shims are this program.
	if status, ours := shim.Dispatch(os.Args); ours {
		os.Exit(status)
	}
	os.Exit(cli.Main(context.Background(), cli.OS()))
}
