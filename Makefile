# What people type. Each target is a script in scripts/ (or tests/), with its story at its top.

PREFIX ?= /usr/local
BUNDLE ?=
ARGS ?=

.PHONY: help
help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

.PHONY: run
run: ## Run a bundle in its own virtual machine (BUNDLE=path; without: a Debian demo)
	@scripts/run $(BUNDLE)

.PHONY: build
build: ## Build the guest kernel, the guest image and the binaries
	@scripts/packages run
	@scripts/build

.PHONY: test
test: ## Run every test: units, the software machine, and KVM in the lab
	@scripts/test

.PHONY: check
check: ## Check format, clippy, documentation and scripts
	@scripts/check

.PHONY: bench
bench: ## Measure, in the lab and here
	@scripts/bench

.PHONY: lab
lab: ## Start a shell in the lab, a machine with KVM (ARGS="command …" runs that instead)
	@scripts/lab $(ARGS)

.PHONY: install
install: build ## Install under PREFIX (/usr/local), DESTDIR honoured
	@scripts/install "$(DESTDIR)$(PREFIX)"

.PHONY: clean
clean: ## Remove what was built here (the cache of kernels and file systems stays)
	rm -rf build target
