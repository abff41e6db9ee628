# Each target sets up what it needs (scripts/setup), so that a fresh clone is enough.
# PYTHON picks the interpreter of .venv; SETUP=: skips installing system packages.
# make vm: CID= the VM's address, MEM= its memory in MiB, IMAGE= a CoreOS qcow2, KEY= an ssh public key,
# ONCE=yes: end after the probe.

PYTHON ?= python3
SETUP ?= scripts/setup
VENV := .venv
RUN := $(VENV)/bin
PYTEST := $(RUN)/python -m pytest -q

.PHONY: help run test lint unit process bpf image image-test machine vm vm-test bench clean

help:
	@echo 'make run      build the image, start the echo sockets, show a line per family echoed'
	@echo 'make test     lint and every tier: unit process image-test machine vm-test'
	@echo 'make lint     ruff, mypy, shellcheck, actionlint, zizmor'
	@echo 'make unit     unit and property tests: nothing outside Python'
	@echo 'make process  real processes and sockets, no container'
	@echo 'make bpf      compile the BPF program of dispatch'
	@echo 'make image    localhost/echo-appliance:latest and build/echo-appliance.oci.tar'
	@echo 'make image-test  what is in the image, and how it runs'
	@echo 'make machine  systemd as PID 1, rootless podman, the units (root)'
	@echo 'make vm       a VM by Ignition, echoing over AF_VSOCK; CID=, IMAGE= (CoreOS, qcow2), MEM=, KEY='
	@echo 'make vm-test  the same, tested'
	@echo 'make bench    every mode beside its peers, in turn; writes bench/RESULTS.md (dispatch: root)'
	@echo 'make clean    remove what was built here (not ~/.cache/echo-appliance)'

$(VENV)/made: pyproject.toml scripts/setup
	$(SETUP) base
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

run:
	$(SETUP) base image
	$(MAKE) $(VENV)/made
	scripts/run

test: lint unit process image-test machine vm-test

lint: $(VENV)/made
	$(SETUP) lint
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	shellcheck scripts/setup scripts/bpf scripts/run scripts/image scripts/image-podman scripts/lint-workflows \
		.ci/run tests/machine/*.sh vm/guest/* systemd/vm/echo-image
	scripts/lint-workflows

unit: $(VENV)/made
	$(PYTEST) tests/unit tests/property

process: $(VENV)/made bpf
	$(SETUP) process
	$(PYTEST) tests/process

BPF := app/echo_appliance/dispatch/dispatch.bpf

bpf: $(BPF).o

$(BPF).o: $(BPF).c scripts/bpf
	$(SETUP) bpf
	scripts/bpf

image: $(VENV)/made
	$(SETUP) image
	scripts/image

image-test: image
	$(PYTEST) tests/image

machine: image bpf
	$(SETUP) machine
	$(PYTEST) tests/machine

vm: export CID := $(CID)
vm: export MEM := $(MEM)
vm: export IMAGE := $(IMAGE)
vm: export KEY := $(KEY)
vm: export ONCE := $(ONCE)
vm: image
	$(SETUP) vm
	@$(RUN)/python -m vm

vm-test: image
	$(SETUP) vm
	$(PYTEST) tests/vm

bench: image
bench: image bpf
	$(SETUP) bench vm
	$(RUN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(RUN)/python -m bench

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
