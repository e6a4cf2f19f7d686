"""XDR and signatures: what is written is read back; whatever else is an XdrError that took no more than there was."""

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.libvirt import rpc
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.wire import TYPES, DomainRef, Signature, encode_error, llong_param, string_param, uint_param
from vmm.libvirt.xdr import Array, CharArray, Opaque, Optional, String, XdrError, decode, encode

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)


@settings(deadline=None)
@given(TEXTS, st.binary(min_size=16, max_size=16), st.integers(-(2**31), 2**31 - 1))
def test_a_domain_is_read_back(name: str, uuid: bytes, number: int) -> None:
    dom = DomainRef(name, uuid, number)
    data = encode(TYPES["domain"], dom)
    assert len(data) % 4 == 0
    assert decode(TYPES["domain"], data) == dom


def test_forms_of_rfc_4506() -> None:
    assert encode(String(10), "sillyprog") == b"\0\0\0\x09sillyprog\0\0\0"  # the example of section 7
    assert encode(Optional(TYPES["int"]), None) == bytes(4)
    assert decode(Optional(TYPES["int"]), b"\1\0\0\0\0\0\0\7") == 7  # as go-libvirt says that there is one
    assert encode(Optional(TYPES["int"]), -1) == b"\0\0\0\1\xff\xff\xff\xff"
    assert encode(Array(TYPES["hyper"], 2), [1]) == b"\0\0\0\1" + bytes(7) + b"\1"
    assert encode(Opaque(4), b"abc") == b"\0\0\0\3abc\0"
    assert encode(CharArray(3), "ab") == b"\0\0\0a\0\0\0b\0\0\0\0"
    signature = Signature("params:param<3>")
    params = [uint_param("u", 7), llong_param("l", -7), string_param("s", "ż")]
    assert signature.read(signature.write(params)) == {"params": params}


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (String(4), b"\0\0\0\5abcde\0\0\0"),
        (String(4), b"\0\0\0\4abc"),
        (String(4), b"\0\0\0\1\xff\0\0\0"),
        (String(4), b"\0\0\0\2a\0\0\0"),
        (Optional(TYPES["int"]), b"\0\0\0\1\0\0\0"),
        (Array(TYPES["int"], 2), b"\0\0\0\3" + bytes(12)),
        (TYPES["param"], b"\0\0\0\1a\0\0\0\0\0\0\x08\0\0\0\0"),
        (TYPES["int"], b"\0\0\0\0\0"),
    ],
)
def test_what_is_malformed_is_an_xdr_error(kind: object, data: bytes) -> None:
    with pytest.raises(XdrError):
        decode(kind, data)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.sampled_from(sorted(TYPES)), st.binary(max_size=200))
def test_garbage_is_a_value_or_an_xdr_error(name: str, data: bytes) -> None:
    try:
        value = decode(TYPES[name], data)
    except XdrError:
        return
    assert decode(TYPES[name], encode(TYPES[name], value)) == value


def test_an_announced_length_takes_no_memory() -> None:
    data = struct.pack(">I", 0x0FFF_FFFF) + bytes(64)
    tracemalloc.start()
    for kind in (Array(TYPES["domain"], 1 << 30), Opaque(1 << 30), String(1 << 30)):
        with pytest.raises(XdrError):
            decode(kind, data)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 27, rpc.MAX_MESSAGE + 1, 0xFFFF_FFFF])
def test_a_message_that_is_too_short_or_too_long_is_refused(length: int) -> None:
    with pytest.raises(XdrError):
        rpc.message_length(struct.pack(">I", length), rpc.MAX_MESSAGE)


def test_an_error_has_its_code_domain_level_and_text() -> None:
    body = encode_error(LibvirtError(Code.NO_DOMAIN, "no domain with matching name 'x'"))
    code, source, present, length = struct.unpack_from(">iiII", body)
    assert (code, source, present) == (42, 10, 1)
    assert body[16 : 16 + length] == b"Domain not found: no domain with matching name 'x'"
