// Command mosagent is the node's program: init of a diskless machine, the
// agent, and the user tools by the name they are called with. The verbs are
// in internal/nodecli.
package main

import (
	"context"
	"os"

	"mosimg/internal/nodecli"
)

func main() { os.Exit(nodecli.Main(context.Background(), nodecli.OS())) }
