"""XML from clients, read safely and to the last attribute; and XML as libvirt writes it.

`parse` takes no document type, so there are no entities to expand and no files to fetch, and bounds depth, elements and
length. `Reader` walks a tree and remembers what was asked for: `done()` refuses by name what nobody did, so that
nothing that a client wrote is dropped in silence. Prefixes are kept as they stand (`loopvisor:machine`). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pyexpat import ExpatError, ParserCreate, errors
from xml.etree.ElementTree import Element, TreeBuilder
from xml.sax.saxutils import escape

from vmm.libvirt.errors import Code, From, LibvirtError

MAX_LENGTH = 1 << 20
"""Bytes of a document."""
MAX_DEPTH = 64
MAX_ELEMENTS = 20_000


def malformed(detail: str) -> LibvirtError:
    """The document is not what it should be."""
    return LibvirtError(Code.XML_ERROR, detail, From.DOMAIN)


def unsupported(detail: str) -> LibvirtError:
    """The document asks for what is not there."""
    return LibvirtError(Code.CONFIG_UNSUPPORTED, detail, From.DOMAIN)


def parse(text: str, root: str) -> Element:
    """The document's root, which must have this name. Raises LibvirtError."""
    if len(text) > MAX_LENGTH:
        raise malformed(f"a document of {len(text)} characters; at most {MAX_LENGTH} are taken")
    builder = TreeBuilder()
    depth = count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > MAX_DEPTH or count > MAX_ELEMENTS:
            raise malformed(f"<{tag}>: more than {MAX_DEPTH} levels or {MAX_ELEMENTS} elements")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def doctype(*_: object) -> None:
        raise malformed("a document type declaration, which is not taken")

    parser = ParserCreate("UTF-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(text.encode(), True)
    except ExpatError as error:
        reason = errors.messages.get(error.code, "malformed")
        text = f"({root}):{error.lineno}: column {error.offset + 1}: {reason}"
        raise LibvirtError(Code.XML_DETAIL, text, From.DOMAIN) from None
    except UnicodeEncodeError:
        raise malformed("text that is not UTF-8") from None
    tree = builder.close()
    if tree.tag != root:
        raise LibvirtError(Code.XML_ERROR, f"expecting root element of '{root}', not '{tree.tag}'", From.XML)
    return tree


class Reader:
    """An element that is being read; what is not asked for is refused by `done`."""

    def __init__(self, element: Element, path: str = "") -> None:
        self.element = element
        self.path = path or element.tag
        self._attributes: set[str] = set()
        self._children: set[int] = set()
        self._text_read = False
        self._readers: list[Reader] = []

    def attribute(self, name: str, default: str | None = None) -> str | None:
        """Its value, stripped, or the default."""
        self._attributes.add(name)
        value = self.element.get(name)
        return default if value is None else value.strip()

    def needed(self, name: str) -> str:
        """An attribute that must be there. Raises LibvirtError."""
        value = self.attribute(name)
        if not value:
            raise malformed(f"<{self.path}>: attribute {name!r} is missing")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str | None:
        """An attribute that must be one of these if it is there. Raises LibvirtError."""
        value = self.attribute(name)
        if value is None:
            return default
        if value not in allowed:
            raise unsupported(f"<{self.path} {name}='{value}'>: here is only {' or '.join(allowed)}")
        return value

    def ignore(self, *names: str) -> None:
        """Attributes that say nothing here."""
        self._attributes.update(names)

    def text(self) -> str:
        """Its text, stripped."""
        self._text_read = True
        return (self.element.text or "").strip()

    def child(self, name: str) -> Reader | None:
        """The one child of that name. Raises LibvirtError if there are several."""
        found = list(self.children(name))
        if len(found) > 1:
            raise malformed(f"<{self.path}>: <{name}> stands there {len(found)} times")
        return found[0] if found else None

    def children(self, *names: str) -> Iterator[Reader]:
        """Children of these names, in the document's order; of all names if none is given."""
        for index, element in enumerate(self.element):
            if not names or element.tag in names:
                self._children.add(index)
                reader = Reader(element, f"{self.path}/{element.tag}")
                self._readers.append(reader)
                yield reader

    def take_all(self) -> None:
        """Everything below was looked at otherwise."""
        self._attributes.update(self.element.keys())
        self._children.update(range(len(self.element)))
        self._text_read = True

    def done(self) -> None:
        """Raises LibvirtError for the first attribute, element or text that nobody asked for, here or below."""
        for name, value in self.element.items():
            if name not in self._attributes and not name.startswith("xmlns"):
                raise unsupported(f"<{self.path} {name}='{value}'>: this machine has no such thing")
        for index, element in enumerate(self.element):
            if index not in self._children:
                raise unsupported(f"<{self.path}/{element.tag}>: this machine has no such thing")
        if not self._text_read and (self.element.text or "").strip() and not len(self.element):
            raise unsupported(f"<{self.path}>: text where none belongs")
        for reader in self._readers:
            reader.done()


def add(parent: Element, tag: str, text: str | None = None, /, **attributes: str | int | None) -> Element:
    """Append an element; attributes that are None are left out."""
    given = {key: str(value) for key, value in attributes.items() if value is not None}
    element = Element(tag, given)
    element.text = text
    parent.append(element)
    return element


_CONTROL = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def serialise(element: Element) -> str:
    """As libvirt writes it: two spaces a level, single quotes."""
    lines: list[str] = []
    _write(element, 0, lines)
    return "\n".join(lines) + "\n"


def _write(element: Element, level: int, lines: list[str]) -> None:
    space = "  " * level
    quotes = {"'": "&apos;", '"': "&quot;", "\n": "&#10;", "\t": "&#9;", "\r": "&#13;"}
    inside = "".join(f" {key}='{escape(_CONTROL.sub('', value), quotes)}'" for key, value in element.items())
    text = _CONTROL.sub("", element.text or "")
    if len(element):
        lines.append(f"{space}<{element.tag}{inside}>")
        if text.strip():
            lines.append(escape(text.strip()))
        for child in element:
            _write(child, level + 1, lines)
        lines.append(f"{space}</{element.tag}>")
    elif text:
        lines.append(f"{space}<{element.tag}{inside}>{escape(text)}</{element.tag}>")
    else:
        lines.append(f"{space}<{element.tag}{inside}/>")
