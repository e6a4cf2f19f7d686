"""Shared directories: the device of a configured one. Loop thread."""

from __future__ import annotations

import os

from virtio.device import Device
from virtio.devices.fs import FsDevice
from vmm.config import Share
from vmm.devices.virtio.pool import Maker, TransportKind


class ShareMaker(Maker):
    """One shared directory of the configuration, which has an id."""

    def __init__(self, share: Share) -> None:
        self.transport: TransportKind = share.transport
        self._share = share

    async def make(self) -> Device:
        share = self._share
        owner = None
        if share.uid is not None:
            owner = share.uid, share.uid if share.gid is None else share.gid
        elif os.geteuid():
            owner = 0, 0  # what this user makes there is the guest's root's, who could not change it otherwise
        return FsDevice(share.path, share.id, read_only=share.readonly, owner=owner, cache=share.cache)
