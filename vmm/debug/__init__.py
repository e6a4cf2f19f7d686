"""Looking into a machine: GDB's remote protocol, registers, traces, kernel symbols. docs/debugging.md is for users."""
