"""The KVM rig: a Debian guest under QEMU's TCG, which emulates SVM with nested paging, so that kvm-amd runs inside.

`python -m tests.rig` runs this project's KVM-marked tests in it, whatever the host's processor offers. The guest is
Debian's kernel and busybox (from packages, without root, cached); its file system is the host's own, shared
read-only, so the tests run with this checkout, this interpreter and these dependencies.
"""
