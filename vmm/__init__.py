"""The machine: configuration, memory, buses, boot, interrupts, lifecycle, embedding."""
