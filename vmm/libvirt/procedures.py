"""Which procedures there are, which of them this daemon answers, and with what.

A module that answers procedures makes a `Procedures` and decorates its functions:

    @calls.query(14, "domain_get_xml_desc", "dom:domain flags:uint", "xml:string")
    async def get_xml(call: Call, dom: DomainRef, flags: int) -> str: ...

`query` is what a read-only client may call as well, `change` what it may not. The signatures are the declaration: they
decode the call and encode the answer. Knows no particular procedure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from vmm.libvirt.wire import Signature

Handler = Callable[..., Awaitable[Any]]
H = TypeVar("H", bound=Handler)


class Procedure(NamedTuple):
    """One that is answered. `stream`: its reply opens a stream."""

    number: int
    name: str
    arguments: Signature
    result: Signature
    handler: Handler
    read_only: bool


class Procedures:
    """The procedures of one program that some module answers, by number."""

    def __init__(self) -> None:
        self.known: dict[int, Procedure] = {}

    def query(self, number: int, name: str, arguments: str = "", result: str = "") -> Callable[[H], H]:
        """For read-only clients as well."""
        return self._declare(number, name, arguments, result, read_only=True)

    def change(self, number: int, name: str, arguments: str = "", result: str = "") -> Callable[[H], H]:
        """Not for read-only clients."""
        return self._declare(number, name, arguments, result, read_only=False)

    def _declare(self, number: int, name: str, arguments: str, result: str, *, read_only: bool) -> Callable[[H], H]:
        def decorate(handler: H) -> H:
            assert number not in self.known, name
            self.known[number] = Procedure(number, name, Signature(arguments), Signature(result), handler, read_only)
            return handler

        return decorate


def joined(tables: Iterable[Procedures]) -> dict[int, Procedure]:
    """The procedures of several modules."""
    found: dict[int, Procedure] = {}
    for table in tables:
        assert not found.keys() & table.known.keys()
        found |= table.known
    return found
