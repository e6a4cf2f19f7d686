"""Management by libvirt's remote protocol: what virsh, libvirt-python, virt-install and their like connect to."""
