"""The machine that a guest sees: core, memory, buses, interrupt lines, clock, and the dispatcher of its exits."""
