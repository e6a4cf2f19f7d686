"""Title, description and other programs' metadata of a definition, read and changed. Pure."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree.ElementTree import Element

from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.spec import Spec
from vmm.libvirt.xmltree import parse, serialise

DESCRIPTION, TITLE, ELEMENT = 0, 1, 2
"""virDomainMetadataType."""
PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


def _tree(spec: Spec) -> Element:
    return parse(f"<metadata>{spec.metadata}</metadata>", "metadata")


def _of(element: Element, uri: str) -> bool:
    """The element is in that namespace, which it declares itself."""
    prefix, colon, _ = element.tag.rpartition(":")
    return element.get(f"xmlns:{prefix}" if colon else "xmlns") == uri


def get_metadata(spec: Spec, kind: int, uri: str | None) -> str:
    """What is asked for, "" if it is not there. Raises LibvirtError."""
    if kind == DESCRIPTION:
        return spec.description
    if kind == TITLE:
        return spec.title
    if kind != ELEMENT or not uri:
        raise LibvirtError(Code.INVALID_ARG, f"metadata of type {kind} and namespace {uri!r}")
    found = next((child for child in _tree(spec) if _of(child, uri)), None)
    if found is None:
        return ""
    # As it was given: without the prefix that it was stored with.
    prefix, colon, tag = found.tag.rpartition(":")
    if not colon:
        return serialise(found)
    return serialise(_renamed(found, prefix + ":", "", {f"xmlns:{prefix}"}))


def set_metadata(spec: Spec, kind: int, text: str | None, key: str | None, uri: str | None) -> Spec:
    """With it set, or removed if the text is None. Raises LibvirtError."""
    if kind == DESCRIPTION:
        return replace(spec, description=text or "")
    if kind == TITLE:
        if text and "\n" in text:
            raise LibvirtError(Code.INVALID_ARG, "metadata title can't contain newlines")
        return replace(spec, title=text or "")
    if kind != ELEMENT or not uri:
        raise LibvirtError(Code.INVALID_ARG, f"metadata of type {kind} and namespace {uri!r}")
    tree = _tree(spec)
    kept = [child for child in tree if not _of(child, uri)]
    if text is not None:
        if not key or not PREFIX.fullmatch(key):
            raise LibvirtError(Code.INVALID_ARG, f"{key!r} is no prefix for a namespace")
        element = _any_root(text)
        named = _renamed(element, "", f"{key}:", set())
        named.attrib = {f"xmlns:{key}": uri, **named.attrib}
        kept.append(named)
    return replace(spec, metadata="".join(serialise(child) for child in kept))


def _any_root(text: str) -> Element:
    """The one element that a text is; its name is its writer's affair."""
    tree = parse(f"<metadata>{text}</metadata>", "metadata")
    if len(tree) != 1:
        raise LibvirtError(Code.XML_ERROR, "metadata is one element")
    return tree[0]


def _renamed(element: Element, old: str, new: str, without: set[str]) -> Element:
    """A copy in which the prefix `old` is `new`."""
    tag = element.tag
    if old and tag.startswith(old):
        tag = tag.removeprefix(old)
    elif not old and ":" not in tag:
        tag = new + tag
    copy = Element(tag, {key: value for key, value in element.attrib.items() if key not in without})
    copy.text = element.text
    for child in element:
        copy.append(_renamed(child, old, new, without))
    return copy
