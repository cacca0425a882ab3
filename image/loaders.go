package image

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"mosimg/image/debian"
	"mosimg/image/steps"
	"mosimg/internal/fault"
)

// loaderFiles are what the boot media are made bootable with. They are not
// the profile's: what is done to their bytes is in uki, syslinux and iso.
var loaderFiles = []struct{ name, pkg, from string }{
	{"stub", "systemd-boot-efi", "usr/lib/systemd/boot/efi/linuxx64.efi.stub"},
	{"syslinux", "syslinux", "usr/bin/syslinux"}, // has ldlinux.sys in it
	{"gptmbr.bin", "syslinux-common", "usr/lib/syslinux/mbr/gptmbr.bin"},
	{"ldlinux.c32", "syslinux-common", "usr/lib/syslinux/modules/bios/ldlinux.c32"},
	{"isolinux.bin", "isolinux", "usr/lib/ISOLINUX/isolinux.bin"},
	{"isohdpfx.bin", "isolinux", "usr/lib/ISOLINUX/isohdpfx.bin"},
}

func loaderPackages() (names []string) {
	for _, f := range loaderFiles {
		if !slices.Contains(names, f.pkg) {
			names = append(names, f.pkg)
		}
	}
	return names
}

// loadersStep takes the loaders of the boot media out of their packages.
func (b *builder) loadersStep() (*steps.Step, error) {
	packages := make(map[string]*debian.Package)
	for _, p := range b.lock.Loaders {
		packages[p.Name] = p
	}
	for _, name := range loaderPackages() {
		if packages[name] == nil {
			return nil, fault.New(fault.NotFound, "find package", name, "the suite does not have it", "without it there is only --outputs pxe")
		}
	}
	return &steps.Step{
		Name: stepLoaders, Inputs: pin(map[string]string{}, b.lock.Loaders...), Code: []fs.FS{source, debian.Source},
		Run: func(ctx context.Context, job *steps.Job) error {
			wanted := make(map[string]bool)
			for _, f := range loaderFiles {
				wanted[f.from] = true
			}
			c, err := b.open(ctx, job, b.lock.Loaders, func(name string) bool { return wanted[name] })
			if err != nil {
				return err
			}
			for _, f := range loaderFiles {
				data, err := c.read(f.from)
				if err != nil {
					return fmt.Errorf("boot loader %s: package %s %s: %w", f.name, f.pkg, packages[f.pkg].Version, err)
				}
				if err := os.WriteFile(job.Path(f.name), data, 0o644); err != nil {
					return err
				}
			}
			return writeInfo(job, info{Licences: c.licences(b.lock.Loaders...)})
		},
	}, nil
}
