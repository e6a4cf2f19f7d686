"""The device-side MUSTs of virtio 1.2 for what is built here, and the tests that cover them (marker `clause`).

`python -m tests.support.clauses` writes docs/virtio-clauses.md; tests/unit/virtio/test_clauses.py holds it current.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "virtio-clauses.md"

# id -> the clause. An id is the section of virtio 1.2 (csd01) and a letter.
CLAUSES: dict[str, str] = {
    "2.1.2-a": "The device MUST NOT consume buffers or send any used buffer notifications before DRIVER_OK.",
    "2.1.2-b": "If DRIVER_OK is set, after it sets DEVICE_NEEDS_RESET, the device MUST send a device configuration "
    "change notification to the driver.",
    "2.2.2-a": "The device MUST NOT offer a feature which requires another feature which was not offered.",
    "2.2.2-b": "Otherwise it MUST fail to set the FEATURES_OK device status bit when the driver writes it.",
    "2.4.1-a": "A device MUST reinitialize device status to 0 after receiving a reset.",
    "2.4.1-b": "A device MUST NOT send notifications or interact with the queues after indicating completion of the "
    "reset, until the driver re-initializes the device.",
    "2.5.3-a": "The device MUST allow reading of any device-specific configuration field before FEATURES_OK is set by "
    "the driver.",
    "2.7.4-a": "The device MUST NOT make assumptions about the particular arrangement of descriptors.",
    "2.7.5-a": "A device MUST NOT write to a device-readable buffer.",
    "2.7.5.3.2-a": "The device MUST ignore the write-only flag in the descriptor that refers to an indirect table.",
    "2.7.5.3.2-b": "The device MUST handle the case of zero or more normal chained descriptors followed by a single "
    "descriptor with VIRTQ_DESC_F_INDIRECT.",
    "2.7.7.2-a": "Without EVENT_IDX: the device MUST ignore the used_event value; if flags is 0, it MUST send a "
    "notification.",
    "2.7.7.2-b": "With EVENT_IDX: the device MUST ignore the lower bit of flags; if used idx was equal to used_event, "
    "it MUST send a notification.",
    "2.7.8.2-a": "The device MUST set len prior to updating the used idx.",
    "2.7.8.2-b": "The device MUST write at least len bytes to descriptor, beginning at the first device-writable "
    "buffer, prior to updating the used idx.",
    "2.7.9-a": "With VIRTIO_F_IN_ORDER the device uses buffers in the same order in which they have been available.",
    "2.7.10-a": "Without EVENT_IDX the device MUST set flags to 0 or 1; with it, it MUST set flags to 0.",
    "2.8-a": "Packed rings: used descriptors carry the buffer id, length and flags of 2.8.1 to 2.8.6, with the wrap "
    "counters.",
    "2.8-b": "Packed rings: event suppression structures are honoured and written (2.8.14).",
    "4.1.2.1-a": "Devices MUST have the PCI Vendor ID 0x1AF4, and a PCI Device ID of 0x1040 plus the Virtio Device ID.",
    "4.1.4.3.1-a": "The device MUST present at least one common configuration capability; offset 4-byte aligned.",
    "4.1.4.3.1-b": "The device MUST present the feature bits it is offering in device_feature, starting at bit "
    "device_feature_select * 32.",
    "4.1.4.3.1-c": "The device MUST present any valid feature bits the driver has written in driver_feature.",
    "4.1.4.3.1-d": "The device MUST present a changed config_generation after the driver has read a configuration "
    "that has since changed.",
    "4.1.4.3.1-e": "The device MUST reset when 0 is written to device_status, and present a 0 in it once done.",
    "4.1.4.3.1-f": "The device MUST present a 0 in queue_enable on reset.",
    "4.1.4.3.1-g": "The device MUST present a 0 in queue_size if the virtqueue for queue_select is unavailable.",
    "4.1.4.4.1-a": "The device MUST present at least one notification capability; its length holds every queue's "
    "notification address.",
    "4.1.4.5.1-a": "The device MUST present at least one VIRTIO_PCI_CAP_ISR_CFG capability.",
    "4.1.4.5.1-b": "The device MUST set the Device Configuration Interrupt bit in ISR status before sending a device "
    "configuration change notification.",
    "4.1.4.5.1-c": "If MSI-X is disabled, the device MUST set the Queue Interrupt bit in ISR status before sending a "
    "virtqueue notification.",
    "4.1.4.5.1-d": "If MSI-X is disabled, the device MUST set the Interrupt Status bit in the PCI Status register to "
    "the logical OR of all bits in ISR status.",
    "4.1.4.5.1-e": "The device MUST reset ISR status to 0 on driver read.",
    "4.1.4.6.1-a": "The device MUST present at least one VIRTIO_PCI_CAP_DEVICE_CFG capability for any device type "
    "which has a device-specific configuration.",
    "4.1.4.9.1-a": "The device MUST present at least one VIRTIO_PCI_CAP_PCI_CFG capability.",
    "4.1.4.9.1-b": "Upon detecting driver write or read access to pci_cfg_data, the device MUST execute the access at "
    "cap.offset of the BAR selected by cap.bar.",
    "4.1.5.1.2.1-a": "The device MUST support mapping any event type to any valid vector, and unmapping.",
    "4.1.5.1.2.1-b": "The device MUST return the vector mapped to a given event (NO_VECTOR if unmapped).",
    "4.1.5.1.2.1-c": "The device MUST have all queue and configuration change events unmapped upon reset.",
    "4.1.5.1.2.1-d": "Devices MUST report mapping failures by returning NO_VECTOR when the relevant field is read.",
    "4.2.2.1-a": "The device MUST return 0x74726976 in MagicValue and 0x2 in Version.",
    "4.2.2.1-b": "The device MUST present each event by setting the corresponding bit in InterruptStatus until the "
    "driver acknowledges it by InterruptACK.",
    "4.2.2.1-c": "Upon reset, the device MUST clear all bits in InterruptStatus and ready bits in QueueReady.",
    "4.2.2.1-d": "The device MUST change value returned in ConfigGeneration if there is any risk of a driver seeing an "
    "inconsistent configuration state.",
    "4.2.2.1-e": "The device MUST NOT access virtual queue contents when QueueReady is zero.",
    "5.1.4.1-a": "The device MUST set max_virtqueue_pairs to between 1 and 0x8000 inclusive, if it offers MQ.",
    "5.1.4.1-b": "The device MUST set mtu to between 68 and 65535 inclusive, if it offers VIRTIO_NET_F_MTU.",
    "5.1.4.1-c": "The device MUST NOT pass received packets that exceed mtu once VIRTIO_NET_F_MTU was negotiated.",
    "5.1.6.4.1-a": "If VIRTIO_NET_F_MRG_RXBUF has not been negotiated, the device MUST set num_buffers to 1.",
    "5.1.6.4.1-b": "If VIRTIO_NET_F_MRG_RXBUF has been negotiated, the device MUST set num_buffers to the number of "
    "buffers the packet is spread over.",
    "5.1.6.5-a": "The device answers each control command with VIRTIO_NET_OK or VIRTIO_NET_ERR.",
    "5.1.6.5.5-a": "The device MUST NOT queue packets on receive queues greater than virtqueue_pairs once it has used "
    "VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.",
    "5.2.5.2-a": "Devices that offer CONFIG_WCE initialize writeback and let the driver change it.",
    "5.2.6.2-a": "A device MUST set the status byte to VIRTIO_BLK_S_IOERR for a write request if the "
    "VIRTIO_BLK_F_RO feature if offered, and MUST NOT write any data.",
    "5.2.6.2-b": "The device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard, secure erase and write "
    "zeroes commands if any unknown flag is set.",
    "5.2.6.2-c": "The device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard commands if the unmap flag "
    "is set.",
    "5.2.6.2-d": "A write that completed before a flush is submitted MUST be stable once the flush completes.",
    "5.3.6.2-a": "Multiport: the device tells ports, names and sizes by control messages, and hears of opening.",
    "5.4.6.2-a": "The device MUST place one or more random bytes into the buffer.",
    "5.10.6.3.1-a": "VIRTIO_VSOCK_OP_RW data packets MUST only be transmitted when the peer has sufficient free "
    "buffer space for the payload.",
    "5.10.6.3.1-b": "All packets of a stream flow MUST contain valid information in buf_alloc and fwd_cnt.",
    "5.10.6.4.1-a": "A packet for an unknown connection or of an unknown type is answered with VIRTIO_VSOCK_OP_RST.",
    "5.10.6.7-a": "After a transport reset the device sends VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.",
}


def marked() -> dict[str, list[str]]:
    """clause -> the tests that carry its marker, as path::name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.clause":
                    for argument in decorator.args:
                        name = f"{path.relative_to(ROOT)}::{node.name}"
                        found.setdefault(ast.literal_eval(argument), []).append(name)
    return found


def render() -> str:
    """The table, and the clauses that no test covers."""
    tests = marked()
    unknown = sorted(set(tests) - set(CLAUSES))
    if unknown:
        raise ValueError(f"tests mark clauses that are not listed: {unknown}")
    lines = [
        "# virtio 1.2: device-side requirements and their tests",
        "",
        "Generated by `python -m tests.support.clauses` from the `clause` markers of the tests. Sections are those of",
        "virtio 1.2 (csd01); long clauses are shortened.",
        "",
        f"{sum(1 for clause in CLAUSES if clause in tests)} of {len(CLAUSES)} are covered.",
        "",
        "| clause | requirement | tests |",
        "|---|---|---|",
    ]
    for clause, text in CLAUSES.items():
        names = "<br>".join(f"`{name.split('/')[-1]}`" for name in tests.get(clause, ["—"]))
        lines.append(f"| {clause} | {text} | {names} |")
    lines += ["", "## Not covered", ""]
    missing = [clause for clause in CLAUSES if clause not in tests]
    lines += [f"- {clause}: {CLAUSES[clause]}" for clause in missing] or ["None."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(render())
