"""The state of a machine: how components declare it, and the files that hold it."""
