// Package nodename says which names machines and clusters may have.
package nodename

import (
	"fmt"
	"regexp"
)

// label is a DNS label in lower case (RFC 1123 section 2.1).
var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Check tells what is wrong with a node's name. It must be a DNS label that
// begins with a letter, so that it is never taken for a node's number.
func Check(name string) error {
	if err := CheckCluster(name); err != nil {
		return err
	}
	if name[0] < 'a' {
		return fmt.Errorf("bad name %q: it must begin with a letter", name)
	}
	return nil
}

// CheckCluster tells what is wrong with a cluster's name.
func CheckCluster(name string) error {
	if !label.MatchString(name) {
		return fmt.Errorf("bad name %q: want 1 to 63 of a-z, 0-9 and '-', and no '-' at either end", name)
	}
	return nil
}
