# Everything a developer or CI runs. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
C_FILES := $(wildcard cpu/*/*.[chS] cpu/soft/*/*.[ch] virtio/native/*.[ch] vmm/native/*.[ch] images/guests/*.[Sh] images/init/*.[ch])

.PHONY: help venv run test test-long test-direct check docs bench soak test-libvirtd test-kvm-rig test-system-rig test-gdb-rig test-kut test-matrix sanitize fuzz soak-images soak-state soak-disks soak-share soak-migration soak-migration-failures soak-programs hostile clean
help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

venv: $(STAMP)   ## create .venv and install the package, editable, with its test extras
$(STAMP): pyproject.toml setup.py $(C_FILES) | packages
	@echo "== building the package into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip 'setuptools>=77' wheel
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[test,net,docs]'
	@$(BIN)/python -m compileall -q cpu vmm virtio cli images
	@touch $@

.PHONY: packages
packages:
	@.ci/packages build

run: venv        ## a shell in a real Linux guest
	@.ci/packages run
	@if $(BIN)/vmm images path linux >/dev/null 2>&1 || $(BIN)/vmm images build linux >/dev/null; then \
		exec $(BIN)/vmm run linux; \
	else \
		echo "the linux image cannot be had here, as said above: the tiny guest 'echo' runs instead (Ctrl-D ends it)" >&2; \
		exec $(BIN)/vmm run echo; \
	fi

test: venv       ## every test but the campaigns, in TEST_PROCESSES (2) processes
	@.ci/packages test
	$(BIN)/python -m tests.support.lanes $${TEST_PROCESSES:-2}

test-long: venv  ## the tests that `make test` skips as campaigns
	@.ci/packages test
	LOOPVISOR_CAMPAIGN=1 $(BIN)/python -m pytest -q -m campaign

test-direct: venv ## tests of guests with direct execution and parallel vCPUs, also where no test asks for them
	@.ci/packages test
	LOOPVISOR_DIRECT=on $(BIN)/python -m tests.support.lanes $${TEST_PROCESSES:-2} tests/integration tests/conformance/state

check: venv      ## ruff, mypy --strict, layering
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layering.py

docs: venv       ## the API reference, in build/docs
	$(BIN)/python docs/api.py

bench: venv      ## print the bench table, write bench.json
	@.ci/packages test
	$(BIN)/python -m tests.bench

soak: venv       ## Debian's kernels under load, compared with the host; SECONDS_EACH=600 for each kernel and 1, 2, 4 vCPUs
	@.ci/packages test
	LOOPVISOR_SOAK=1 $(BIN)/python -m pytest -q tests/integration/test_killed.py
	$(BIN)/python -m tests.soak $${SECONDS_EACH:-600}

test-libvirtd: venv ## a session of virsh, command by command beside libvirtd's QEMU driver; some minutes
	@.ci/packages test
	$(BIN)/python -m tests.integration.test_libvirt_oracle

test-kvm-rig: venv ## the KVM-marked tests against kvm-amd in an emulated host
	@.ci/packages test
	$(BIN)/python -m tests.rig

test-system-rig: venv ## random system-level programs on kvm-amd in the rig, beside the software core; PROGRAMS=4 of each kind
	@.ci/packages test
	$(BIN)/python -m tests.rig.system $${PROGRAMS:-4} $${SEED:-0}

test-gdb-rig: venv ## GDB on Debian's kernel on kvm-intel, in a guest under Bochs; a quarter of an hour and more
	@.ci/packages test
	$(BIN)/python -m tests.rig.bochs

test-kut: venv   ## a build of kvm-unit-tests that you made, program by program beside QEMU; KUT=FOLDER
	$(BIN)/python -m tests.kut $${KUT:?give the folder of your kvm-unit-tests build}

test-matrix: venv ## kernels x ACPI x vCPUs x memory beside QEMU, all 36; `make test` has 9
	@.ci/packages test
	LOOPVISOR_MATRIX=1 $(BIN)/python -m pytest -q tests/integration/test_linux.py -k kernel_log

sanitize: venv   ## C code under ASan and UBSan
	.ci/sanitize

soak-state: venv ## a working Debian guest saved, killed and taken up again, ROUNDS (1000) times
	$(VENV)/bin/python -m tests.soak.state $${ROUNDS:-1000}

soak-migration-failures: venv ## failures injected into migrations at random moments, ROUNDS (500)
	$(VENV)/bin/python -m tests.soak.migration_failures $${ROUNDS:-500}

soak-disks: venv ## disks attached, detached, snapshot, committed and mirrored under fio verify; ATTACHES (100), CHANGES (1000)
	$(VENV)/bin/python -m tests.soak.disks $${ATTACHES:-100} $${CHANGES:-1000}

soak-share: venv ## a shared directory beside the host's own, and random file operations in it; OPERATIONS (100000), every cache mode
	SHARE_OPERATIONS=$${OPERATIONS:-100000} $(VENV)/bin/python -m pytest -q tests/integration/test_share_semantics.py

soak-images: venv ## qcow2: 10,000 operations on each of 20 kinds, 2,000 power cuts on each of 9, 100 rounds of live changes
	$(VENV)/bin/python -m tests.fuzz.image_model $${OPERATIONS:-10000}
	LOOPVISOR_CRASH_POINTS=2000 LOOPVISOR_LIVE_ROUNDS=100 $(VENV)/bin/python -m pytest -q \
	    tests/conformance/virtio/test_power_cut.py tests/conformance/virtio/test_live_images.py

soak-migration: venv ## a working Debian guest moved between two hosts over a slow cable, with a neighbour's connections, MOVES (200) times, CUTS (50) of them cut; root
	$(VENV)/bin/python -m tests.soak.migration $${MOVES:-200} $${CUTS:-50}

soak-programs: venv ## programs of this host in a guest with --direct on, with off, and here: the same output; CASES='java gdb'; root
	$(VENV)/bin/python -m tests.soak.programs $$CASES

hostile: venv    ## hostile programs natively in guests (--direct on, auto), watched from outside; SECONDS_EACH=3600 make hostile; root
	$(VENV)/bin/python -m tests.fuzz.direct_fuzz $${SECONDS_EACH:-600}

fuzz: venv       ## fuzz campaigns; SECONDS_EACH=3600 make fuzz
	.ci/fuzz $${SECONDS_EACH:-600}

clean:           ## remove what was built here
	rm -rf $(VENV) build dist *.egg-info bench.json rig.json .pytest_cache
	find . -name '*.so' -not -path './.venv/*' -delete
