"""`dataclass(frozen=True, slots=True)` without the standard one's code generation.

The standard decorator compiles half a dozen functions for each class: about 0.5 ms, which for the classes that every
run imports was a sixth of the time from `vmm run` to the guest's first instruction (tests.bench start). Here they share
functions that look at the fields instead. To a type checker and to dataclasses.fields() and replace() it is the
standard one. Calls are slower: a class that is made on a hot path writes its own __init__.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(*, frozen: bool, slots: bool):
        """Both must be true; they are there to be read."""
        if not (frozen and slots):
            raise TypeError("values are frozen and have slots")
        return _decorate


U8 = Annotated[int, range(1 << 8)]
U16 = Annotated[int, range(1 << 16)]
U32 = Annotated[int, range(1 << 32)]
U64 = Annotated[int, range(1 << 64)]
I64 = Annotated[int, range(-1 << 63, 1 << 63)]
"""Integers by their width in bits: what the fields of a declared state may be."""

_set = object.__setattr__


def _init(self: Any, *values: Any, **named: Any) -> None:
    names = self.__match_args__
    if len(named) == len(names) and not values:  # how states are parsed (tests.bench state)
        try:
            for name in names:
                _set(self, name, named[name])
            return
        except KeyError:
            pass  # the words below
    if len(values) > len(names):
        raise TypeError(f"{type(self).__name__}() takes {len(names)} arguments, not {len(values)}")
    for name, value in zip(names, values, strict=False):
        _set(self, name, value)
    for name in names[len(values) :]:
        if name in named:
            value = named.pop(name)
        else:
            declared = self.__dataclass_fields__[name]
            if declared.default is not dataclasses.MISSING:
                value = declared.default
            elif declared.default_factory is not dataclasses.MISSING:
                value = declared.default_factory()
            else:
                raise TypeError(f"{type(self).__name__}() needs {name}")
        _set(self, name, value)
    if named:
        raise TypeError(f"{type(self).__name__}() takes no {', '.join(named)}, or takes it once")


def _tuple(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, name) for name in self.__match_args__])


def _repr(self: Any) -> str:
    inside = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__match_args__)
    return f"{type(self).__qualname__}({inside})"


def _eq(self: Any, other: object) -> bool:
    return _tuple(self) == _tuple(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_tuple(self))


def _frozen(self: Any, name: str, *_: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _reduce(self: Any) -> tuple[Any, ...]:
    return type(self), _tuple(self)


_METHODS = {
    "__init__": _init,
    "__repr__": _repr,
    "__eq__": _eq,
    "__hash__": _hash,
    "__setattr__": _frozen,
    "__delattr__": _frozen,
    "__reduce__": _reduce,
}


def _decorate(cls: type) -> type:
    for name, function in _METHODS.items():
        if name not in cls.__dict__:
            setattr(cls, name, function)
    cls.__doc__ = cls.__doc__ or cls.__name__  # else the standard decorator asks for the signature, which is slow
    return dataclasses.dataclass(init=False, repr=False, eq=False, slots=True)(cls)
