"""Runs a developer's own build of kvm-unit-tests on the software core, beside QEMU's emulation."""
