"""Debian's kernels under load on the software core, every result compared with the host's: `python -m tests.soak`.

On a host whose processor is not of the guest's vendor, every result that both vendors' manuals define.

The workload (guest/) is deterministic: what a round prints is a function of its seed. The host runs the same programs
on the same seeds. Several workers run rounds at once in the guest, started through the shell on its serial port.
"""
