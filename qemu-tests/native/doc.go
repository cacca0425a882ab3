// Package native runs whole clusters without virtual machines: the real
// commands in network namespaces that the test makes, one for each machine,
// on one bridge. Only the firmware is simulated (a DHCP client that then
// fetches its iPXE script). What a scenario does here in seconds, the
// scenarios of qemu-tests do once more in virtual machines.
package native
