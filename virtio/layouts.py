"""Every structure of virtio 1.2 that is built here, declared once, little-endian (1.4), with its section.

Cold paths parse and build with these declarations. Hot paths use `fast(declaration)`: a struct.Struct derived
from the same declaration; tests/unit/virtio/test_layouts.py holds the two equal.
"""

from __future__ import annotations

import struct
from typing import Any

from construct import (  # type: ignore[import-untyped,unused-ignore]
    Array,
    Bytes,
    Const,
    FormatField,
    Int8ul,
    Int16ul,
    Int32ul,
    Int64ul,
    Padding,
    Renamed,
    Struct,
)

# 2.7.5 The Virtqueue Descriptor Table
SplitDescriptor = Struct("addr" / Int64ul, "len" / Int32ul, "flags" / Int16ul, "next" / Int16ul)
# 2.7.8 The Virtqueue Used Ring
UsedElement = Struct("id" / Int32ul, "len" / Int32ul)
# 2.7.6, 2.7.8: both rings begin so
RingHeader = Struct("flags" / Int16ul, "idx" / Int16ul)
# 2.8.13 The Virtqueue Descriptor Table (packed)
PackedDescriptor = Struct("addr" / Int64ul, "len" / Int32ul, "id" / Int16ul, "flags" / Int16ul)
# 2.8.14 Event suppression: desc_event_off 15 bits, desc_event_wrap 1, desc_event_flags 2, reserved
EventSuppression = Struct("desc" / Int16ul, "flags" / Int16ul)

# 4.1.4 Virtio Structure PCI Capabilities
PciCapability = Struct(
    "cap_vndr" / Const(0x09, Int8ul),
    "cap_next" / Int8ul,
    "cap_len" / Int8ul,
    "cfg_type" / Int8ul,
    "bar" / Int8ul,
    "id" / Int8ul,
    "padding" / Padding(2),
    "offset" / Int32ul,
    "length" / Int32ul,
)
# 4.1.4.3 Common configuration structure layout
PciCommonConfig = Struct(
    "device_feature_select" / Int32ul,
    "device_feature" / Int32ul,
    "driver_feature_select" / Int32ul,
    "driver_feature" / Int32ul,
    "config_msix_vector" / Int16ul,
    "num_queues" / Int16ul,
    "device_status" / Int8ul,
    "config_generation" / Int8ul,
    "queue_select" / Int16ul,
    "queue_size" / Int16ul,
    "queue_msix_vector" / Int16ul,
    "queue_enable" / Int16ul,
    "queue_notify_off" / Int16ul,
    "queue_desc" / Int64ul,
    "queue_driver" / Int64ul,
    "queue_device" / Int64ul,
    "queue_notify_data" / Int16ul,
    "queue_reset" / Int16ul,
)

# 5.1.4 Network device configuration layout
NetConfig = Struct(
    "mac" / Bytes(6),
    "status" / Int16ul,
    "max_virtqueue_pairs" / Int16ul,
    "mtu" / Int16ul,
    "speed" / Int32ul,
    "duplex" / Int8ul,
    "rss_max_key_size" / Int8ul,
    "rss_max_indirection_table_length" / Int16ul,
    "supported_hash_types" / Int32ul,
)
# 5.1.6 Device operation: struct virtio_net_hdr
NetHeader = Struct(
    "flags" / Int8ul,
    "gso_type" / Int8ul,
    "hdr_len" / Int16ul,
    "gso_size" / Int16ul,
    "csum_start" / Int16ul,
    "csum_offset" / Int16ul,
    "num_buffers" / Int16ul,
)
# 5.1.6.5 Control virtqueue: class and command, then the command's data
NetControl = Struct("class_" / Int8ul, "command" / Int8ul)

# 5.11.4 File system device configuration layout
FsConfig = Struct("tag" / Bytes(36), "num_request_queues" / Int32ul)

# 5.2.4 Block device configuration layout
BalloonConfig = Struct(
    "num_pages" / Int32ul,
    "actual" / Int32ul,
    "free_page_hint_cmd_id" / Int32ul,
    "poison_val" / Int32ul,
)
"""5.5.4"""

BlkConfig = Struct(
    "capacity" / Int64ul,
    "size_max" / Int32ul,
    "seg_max" / Int32ul,
    "cylinders" / Int16ul,
    "heads" / Int8ul,
    "sectors" / Int8ul,
    "blk_size" / Int32ul,
    "physical_block_exp" / Int8ul,
    "alignment_offset" / Int8ul,
    "min_io_size" / Int16ul,
    "opt_io_size" / Int32ul,
    "writeback" / Int8ul,
    "unused0" / Int8ul,
    "num_queues" / Int16ul,
    "max_discard_sectors" / Int32ul,
    "max_discard_seg" / Int32ul,
    "discard_sector_alignment" / Int32ul,
    "max_write_zeroes_sectors" / Int32ul,
    "max_write_zeroes_seg" / Int32ul,
    "write_zeroes_may_unmap" / Int8ul,
    "unused1" / Array(3, Int8ul),
)
# 5.2.6 Device operation: struct virtio_blk_req, its device-readable head
BlkHeader = Struct("type" / Int32ul, "reserved" / Int32ul, "sector" / Int64ul)
# 5.2.6: struct virtio_blk_discard_write_zeroes
BlkZeroes = Struct("sector" / Int64ul, "num_sectors" / Int32ul, "flags" / Int32ul)

# 5.3.4 Console device configuration layout
ConsoleConfig = Struct("cols" / Int16ul, "rows" / Int16ul, "max_nr_ports" / Int32ul, "emerg_wr" / Int32ul)
# 5.3.6.2 Multiport device operation: struct virtio_console_control
ConsoleControl = Struct("id" / Int32ul, "event" / Int16ul, "value" / Int16ul)
# 5.3.6.2: struct virtio_console_resize
ConsoleResize = Struct("cols" / Int16ul, "rows" / Int16ul)

# 5.10.4 Socket device configuration layout
VsockConfig = Struct("guest_cid" / Int64ul)
# 5.10.6 Device operation: struct virtio_vsock_hdr
VsockHeader = Struct(
    "src_cid" / Int64ul,
    "dst_cid" / Int64ul,
    "src_port" / Int32ul,
    "dst_port" / Int32ul,
    "len" / Int32ul,
    "type" / Int16ul,
    "op" / Int16ul,
    "flags" / Int32ul,
    "buf_alloc" / Int32ul,
    "fwd_cnt" / Int32ul,
)
# 5.10.6.7 Device events
VsockEvent = Struct("id" / Int32ul)


def _format(subcon: Any) -> str:
    while isinstance(subcon, Renamed):
        subcon = subcon.subcon
    if isinstance(subcon, Struct):
        return "".join(_format(part) for part in subcon.subcons)
    if isinstance(subcon, Array):
        return _format(subcon.subcon) * int(subcon.count)
    if isinstance(subcon, FormatField):
        return str(subcon.fmtstr).lstrip("<")
    return f"{subcon.sizeof()}s" if isinstance(subcon, Bytes) else _format_other(subcon)


def _format_other(subcon: Any) -> str:
    inner = getattr(subcon, "subcon", None)
    if isinstance(subcon, Const):
        return _format(inner)
    return f"{subcon.sizeof()}x"


def fast(declaration: Any) -> struct.Struct:
    """The declaration's fields, in order, as a little-endian struct.Struct."""
    return struct.Struct("<" + _format(declaration))


def fields(declaration: Any) -> dict[str, tuple[int, int]]:
    """name -> (offset, size), both in bytes."""
    result, at = {}, 0
    for part in declaration.subcons:
        result[part.name] = (at, part.sizeof())
        at += part.sizeof()
    return result
