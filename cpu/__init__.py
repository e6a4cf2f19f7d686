"""Execution cores behind one contract (`cpu.contract`): KVM, software, scripted. Imports no other package here."""
