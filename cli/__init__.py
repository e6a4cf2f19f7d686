"""The `vmm` command: parses, prints, exits."""
