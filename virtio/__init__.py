"""The virtio 1.2 specification, device side: rings, transports, devices, backends. Imports no other package
here."""
