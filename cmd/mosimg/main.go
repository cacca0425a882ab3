// Command mosimg is the operator's tool: build an image, run a head, look
// after nodes, start a lab. The verbs are in internal/cli.
package main

import (
	"context"
	"os"

	"mosimg/internal/cli"
)

func main() { os.Exit(cli.Main(context.Background(), cli.OS())) }
