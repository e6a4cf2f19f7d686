"""What a pager does with descriptors that it is given."""

from __future__ import annotations

import mmap
import os
import socket

import pytest

from vmm import _native


@pytest.mark.skipif(not _native.can_page(False), reason="userfaultfd is not allowed here")
def test_a_pager_that_is_closed_as_soon_as_it_has_a_connection_leaves_no_descriptor() -> None:
    """Its thread may not have looked at the connection yet."""
    with mmap.mmap(-1, 1 << 16) as memory:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            pager = _native.Pager([(memory, bytearray(b"\xff\xff" + bytes(6)))], False)
            here, there = socket.socketpair()
            with here, there:
                pager.attach(here.fileno())
                pager.close()
        assert len(os.listdir("/proc/self/fd")) == before
