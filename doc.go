// Package mosimg is the root of the module. It holds no code, only the tests
// that keep the house in order; commands are in cmd/, and docs/architecture.md
// is the plan of the rest.
package mosimg
