# mosimg: build, check, test, demo. `make help` lists the targets.
# Everything a target needs and this machine lacks is installed by
# scripts/bootstrap, which says what it installs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Where `make demo` and `make test` put the image set.
OUT ?= out
# Where tools that are built from source are kept between runs.
TOOLS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mosimg/tools
LINT_VERSION := v2.15.0
LINT := $(TOOLS)/golangci-lint-$(LINT_VERSION)

# Recipes run with a Go that is new enough first in PATH. It is looked for
# when a recipe needs it, so that `make help` installs nothing.
WITH_GO = go_dir=$$(scripts/bootstrap go); export PATH="$$go_dir:$$PATH";
# Tests that make network namespaces need root.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,-exec "sudo -E")

QEMU_PACKAGES := qemu-system-x86 ipxe-qemu ovmf
TEST_PACKAGES := $(QEMU_PACKAGES) gcc libc6-dev make git perl python3 sqlite3 xz-utils iproute2 curl tftp-hpa atftp busybox isc-dhcp-client udhcpc dnsmasq-base kea-admin systemd util-linux cpio zstd qemu-utils dosfstools mtools gdisk xorriso syslinux

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the commands into bin/
	$(WITH_GO) CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...

.PHONY: check
check: $(LINT) ## Format, lint and unit tests (under 3 minutes)
	$(WITH_GO) unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	  if [ -n "$$unformatted" ]; then echo "gofmt would change: $$unformatted" >&2; exit 1; fi
	$(WITH_GO) go vet ./...
	$(WITH_GO) $(LINT) run ./...
	$(WITH_GO) go test -short ./...

.PHONY: test
test: ## Every test: unit, network namespaces, virtual machines
	scripts/bootstrap apt ca-certificates git $(TEST_PACKAGES)
	$(WITH_GO) go vet ./...
	$(WITH_GO) go run ./cmd/mosimg build -o $(OUT)
	rm -rf $(OUT)-criu
	$(WITH_GO) go run ./cmd/mosimg criu --images $(OUT) -o $(OUT)-criu
	$(WITH_GO) go test $(AS_ROOT) -timeout 15m ./...
	$(WITH_GO) MOSIMG_CRIU="$(abspath $(OUT))-criu" MOSIMG_HOMEFILES=1 go test $(AS_ROOT) -p 1 -timeout 20m ./agent/... ./qemu-tests/native
	$(WITH_GO) MOSIMG_E2E=1 go test -count=1 -timeout 15m -run RealImage ./image
	$(WITH_GO) MOSIMG_VM=1 MOSIMG_IMAGES="$(abspath $(OUT))" go test $(AS_ROOT) -count=1 -timeout 20m -v -run VM ./pxe
	$(WITH_GO) go run ./cmd/mosimg build -o $(OUT)-media --outputs uki,disk,iso,qcow2 --head https://10.77.0.1:4660 --ca sha256:$$(printf mosimg | sha256sum | cut -d' ' -f1)
	$(WITH_GO) MOSIMG_VM=1 MOSIMG_MEDIA="$(abspath $(OUT))-media" go test -count=1 -timeout 20m -v ./qemu-tests/media
	$(WITH_GO) MOSIMG_VM=1 MOSIMG_IMAGES="$(abspath $(OUT))" go test -count=1 -timeout 40m -v ./qemu-tests/scenario

.PHONY: demo
demo: ## Build an image and boot a cluster from it in QEMU
	scripts/bootstrap apt ca-certificates $(QEMU_PACKAGES)
	$(WITH_GO) go run ./cmd/mosimg build -o $(OUT)
	$(WITH_GO) go run ./cmd/mosimg lab demo --images $(OUT)

.PHONY: soak
soak: ## Long fuzzing (FUZZTIME=1m each) and many faults (MOSIMG_FAULTS=300); not in CI
	$(WITH_GO) for pkg in $$(go list ./...); do \
	  for f in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "== $$pkg $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(or $(FUZZTIME),1m) $$pkg; \
	  done; done
	test -d $(OUT)-criu || { echo "no $(OUT)-criu: make test builds it" >&2; exit 1; }
	$(WITH_GO) MOSIMG_CRIU="$(abspath $(OUT))-criu" MOSIMG_FAULTS=$(or $(MOSIMG_FAULTS),300) go test $(AS_ROOT) -count=1 -timeout 3h -run Faults -v ./qemu-tests/native

.PHONY: clean
clean: ## Remove what the targets above made here
	rm -rf bin $(OUT) $(OUT)-criu $(OUT)-media

$(LINT):
	$(WITH_GO) tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	  echo "building golangci-lint $(LINT_VERSION) into $(TOOLS) (once)" >&2 && \
	  GOBIN="$$tmp" go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION) && \
	  mkdir -p $(TOOLS) && mv "$$tmp/golangci-lint" $@
