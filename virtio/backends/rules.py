"""What a guest may reach: rules as users write them, and which addresses and names they allow. Pure.

`example.org:443+*.example.net+10.0.0.0/8+[2001:db8::/32]:22`: names, `*.` for every name below one, addresses and
networks, each with a port or for all. `*` is every name and every address, `host` this host's own addresses, which no
other rule of `allow` opens but one of the very address; `none` alone is nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from virtio.backends.learned import NAMES_MAX, RESOLVED_MAX
from virtio.errors import ConfigError

MAX_RULES = 1000
HOST = "host"
"""How rules call this host."""
_NAME = re.compile(r"(?:\*\.)?(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Rule:
    """One destination: a network, a name or this host, and a port, 0 for all. Every destination has the name *, and the
    one that there is not is none of them."""

    network: Network | None
    name: str
    port: int
    host: bool = False
    """It is this host's own addresses."""

    def has_name(self, name: str) -> bool:
        """Whether the rule is about this name, in lower case and without a dot at its end."""
        if self.name.startswith("*"):
            return name.endswith(self.name[1:])
        return name == self.name != ""

    def has_address(self, address: Address) -> bool:
        """Whether the rule is about this address."""
        return self.name == "*" or (self.network is not None and address in self.network)

    def names_address(self, address: Address) -> bool:
        """Whether the rule is about this address alone."""
        return self.network is not None and self.network.num_addresses == 1 and address in self.network

    def has_port(self, port: int) -> bool:
        """Whether the rule is about this port."""
        return self.port in (0, port)


def stays_here(address: Address) -> bool:
    """Whether a socket of this host takes the address for this host itself, or for one of IPv4 that it holds (RFC 4291,
    2.5.5.2): no packet from a wire may have such a target, and rules of networks do not see what it means."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return True
    return address.is_loopback or address.is_unspecified


def may_be_told(address: Address) -> bool:
    """Whether a guest may hear that a name has this address, and reach it."""
    return not (stays_here(address) or address.is_link_local or address.is_multicast)


def parse(text: str) -> tuple[Rule, ...]:
    """Rules with + between them; "" for none. Raises ConfigError that names the one that is wrong."""
    if text.strip().lower() == "none":
        return (Rule(None, "", 0),)
    items = text.split("+") if text else []
    if len(items) > MAX_RULES:
        raise ConfigError(f"{len(items)} rules; at most {MAX_RULES} are possible")
    return tuple([_rule(item.strip().lower()) for item in items])


def _rule(text: str) -> Rule:
    where, port = text, 0
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{1,5}))?", text)
    if match:
        where, port = match[1].strip("[]"), int(match[2] or 0)
        if match[2] and not 0 < port < 1 << 16:
            raise ConfigError(f"{text!r}: there is no port {match[2]}")
    if where == "*":
        return Rule(None, where, port)
    if where == HOST:
        return Rule(None, "", port, host=True)
    try:
        return Rule(ipaddress.ip_network(where, strict=False), "", port)
    except ValueError:
        if not match or re.fullmatch(r"[0-9./]*", where) or len(where) > 253 or not _NAME.fullmatch(where):
            raise ConfigError(
                f"{text!r} is neither a name, an address nor a network; write for instance example.org:443+10.0.0.0/8"
            ) from None
        return Rule(None, where, port)


class Egress:
    """A policy in force. With `allow` everything else is refused; without, all but `deny` is allowed."""

    def __init__(
        self, allow: tuple[Rule, ...], deny: tuple[Rule, ...], is_own: Callable[[Address], bool] = lambda address: False
    ) -> None:
        """`is_own`: whether an address is this host's."""
        self.allow, self.deny, self.is_own = allow, deny, is_own
        self._learned: OrderedDict[Address, tuple[tuple[Rule, ...], tuple[str, ...]]] = OrderedDict()
        """The rules that open an address, and the latest names that led there."""

    def may_ask(self, name: str) -> bool:
        """Whether the guest may learn the addresses of a name."""
        if any(rule.has_name(name) and not rule.port for rule in self.deny):
            return False
        return not self.allow or any(rule.has_name(name) for rule in self.allow)

    def learn(self, name: str, address: Address) -> bool:
        """A name the guest asked for has this address, which it may reach from now on as the rules of the name say.
        False: nobody's name leads there."""
        if not may_be_told(address):
            return False
        found = tuple([rule for rule in self.allow if rule.has_name(name)])
        rules, names = self._learned.pop(address, ((), ()))
        names = (*(each for each in names if each != name), name)[-NAMES_MAX:]
        self._learned[address] = tuple(dict.fromkeys((*rules, *found))), names
        if len(self._learned) > RESOLVED_MAX:
            self._learned.popitem(last=False)
        return True

    def learned(self) -> Iterator[tuple[Address, tuple[str, ...]]]:
        """Addresses and the names that led there, the latest last."""
        for address, (_, names) in self._learned.items():
            yield address, names

    def adopt(self, address: Address, names: tuple[str, ...]) -> None:
        """Learn what another policy has, by the names that this one allows."""
        for name in names:
            if self.may_ask(name):
                self.learn(name, address)

    def may_reach(self, address: Address, port: int) -> bool:
        """Whether packets may go there. Port 0: a protocol without ports, for which rules with a port do not count.
        Never to this host itself, whatever the rules say."""
        if stays_here(address):
            return False
        deny = [rule for rule in self.deny if rule.has_port(port)]
        if any(rule.has_address(address) for rule in deny):
            return False
        if any(rule.host for rule in deny) and self.is_own(address):
            return False
        if not self.allow:
            return True
        allow = [rule for rule in self.allow if rule.has_port(port)]
        rules, _ = self._learned.get(address, ((), ()))
        wide = any(rule.has_address(address) for rule in allow) or any(rule.has_port(port) for rule in rules)
        if not wide and not any(rule.host for rule in allow):
            return False
        if not self.is_own(address):
            return wide
        return any(rule.host or rule.names_address(address) for rule in allow)
