"""Errors as libvirt's clients know them: a code, the part that reports it, a level and a text.

The numbers are libvirt's public ones (virErrorNumber, virErrorDomain, virErrorLevel); each code has the text in front
of the details that its clients show.
"""

from __future__ import annotations

import enum

from vmm.errors import ConfigError, StateError, VmmError
from vmm.libvirt.xdr import XdrError


class Code(enum.IntEnum):
    """virErrorNumber: what is wrong."""

    INTERNAL_ERROR = 1
    NO_SUPPORT = 3
    INVALID_ARG = 8
    OPERATION_FAILED = 9
    NO_NAME = 21
    XML_ERROR = 27
    DOM_EXIST = 28
    OPERATION_DENIED = 29
    XML_DETAIL = 35
    NETWORK_EXIST = 37
    RPC = 39
    NO_DOMAIN = 42
    NO_NETWORK = 43
    AUTH_FAILED = 45
    NO_STORAGE_POOL = 49
    NO_STORAGE_VOL = 50
    NO_NODE_DEVICE = 53
    OPERATION_INVALID = 55
    NO_INTERFACE = 57
    NO_NWFILTER = 62
    NO_SECRET = 66
    CONFIG_UNSUPPORTED = 67
    NO_DOMAIN_SNAPSHOT = 72
    ARGUMENT_UNSUPPORTED = 74
    NO_DOMAIN_METADATA = 80
    BLOCK_COPY_ACTIVE = 83
    OPERATION_UNSUPPORTED = 84
    AGENT_UNRESPONSIVE = 86
    NO_CLIENT = 96
    NO_SERVER = 95
    STORAGE_VOL_EXIST = 90
    MIGRATE_FINISH_OK = 93


TEXTS = {
    Code.INTERNAL_ERROR: "internal error: ",
    Code.NO_SUPPORT: "this function is not supported by the connection driver: ",
    Code.INVALID_ARG: "invalid argument: ",
    Code.OPERATION_FAILED: "operation failed: ",
    Code.NO_NAME: "",
    Code.XML_ERROR: "XML error: ",
    Code.XML_DETAIL: "",
    Code.DOM_EXIST: "domain already exists: ",
    Code.OPERATION_DENIED: "operation forbidden: ",
    Code.NETWORK_EXIST: "network already exists: ",
    Code.RPC: "",
    Code.NO_DOMAIN: "Domain not found: ",
    Code.NO_NETWORK: "Network not found: ",
    Code.AUTH_FAILED: "authentication failed: ",
    Code.NO_STORAGE_POOL: "Storage pool not found: ",
    Code.NO_STORAGE_VOL: "Storage volume not found: ",
    Code.NO_NODE_DEVICE: "Node device not found: ",
    Code.OPERATION_INVALID: "Requested operation is not valid: ",
    Code.NO_INTERFACE: "Interface not found: ",
    Code.NO_NWFILTER: "Network filter not found: ",
    Code.NO_SECRET: "Secret not found: ",
    Code.CONFIG_UNSUPPORTED: "unsupported configuration: ",
    Code.NO_DOMAIN_SNAPSHOT: "Domain snapshot not found: ",
    Code.ARGUMENT_UNSUPPORTED: "argument unsupported: ",
    Code.NO_DOMAIN_METADATA: "metadata not found: ",
    Code.BLOCK_COPY_ACTIVE: "block copy still active: ",
    Code.OPERATION_UNSUPPORTED: "Operation not supported: ",
    Code.NO_SERVER: "Server not found: ",
    Code.NO_CLIENT: "Client not found: ",
    Code.AGENT_UNRESPONSIVE: "Guest agent is not responding: ",
    Code.MIGRATE_FINISH_OK: "migration successfully aborted: ",
    Code.STORAGE_VOL_EXIST: "storage volume '{}' exists already",
}


class From(enum.IntEnum):
    """virErrorDomain: who reports it."""

    XML = 5
    RPC = 7
    QEMU = 10
    STORAGE = 18
    NETWORK = 19
    DOMAIN = 20
    NODEDEV = 22
    INTERFACE = 26
    SECRET = 30
    NWFILTER = 33
    STREAMS = 38
    ADMIN = 62


class LibvirtError(VmmError):
    """What a call is answered with when it fails."""

    def __init__(self, code: Code, detail: str, source: From = From.QEMU) -> None:
        text = TEXTS[code]
        super().__init__(text.format(detail) if "{}" in text else text + detail)
        self.code, self.source, self.detail = code, source, detail


def translated(error: VmmError) -> LibvirtError:
    """An error of ours in libvirt's terms."""
    if isinstance(error, LibvirtError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, XdrError):
        return LibvirtError(Code.RPC, f"Unable to decode message payload: {text}", From.RPC)
    if isinstance(error, StateError):
        return LibvirtError(Code.OPERATION_INVALID, text)
    if isinstance(error, ConfigError):
        return LibvirtError(Code.CONFIG_UNSUPPORTED, text)
    return LibvirtError(Code.OPERATION_FAILED, text)


def not_running() -> LibvirtError:
    """What needs a machine that runs."""
    return LibvirtError(Code.OPERATION_INVALID, "domain is not running", From.DOMAIN)


def unsupported(what: str) -> LibvirtError:
    """A function that this daemon does not have."""
    return LibvirtError(Code.NO_SUPPORT, what)
