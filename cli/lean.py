"""Modules of the standard library that asyncio and pathlib import and a small guest's run never uses.

On a Python that was built without its optimisations, importing them takes a tenth of the time from `vmm run hello` to
its end (tests.bench start). `prepare()` puts stand-ins in their place; inspect's becomes the real module when anything
else of it is used. Methods of data classes are compiled when they are first called. Only for the command, whose process
is its own.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import CoroutineType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, NoReturn

_CO_COROUTINE, _CO_ITERABLE_COROUTINE = 0x80, 0x100
_real = importlib.import_module


class _StandIn(ModuleType):
    """The module `name`, loaded when something of it is asked for that is not given here."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        module = _real(self.__name__)
        self.__dict__.update(module.__dict__)
        return getattr(module, attribute)


def prepare() -> None:
    """Before anything imports them. What is loaded already stays."""
    if "inspect" not in sys.modules:
        sys.modules["inspect"] = inspect = _StandIn("inspect")
        inspect.iscoroutinefunction = _is_coroutine_function  # type: ignore[attr-defined]
        inspect.isawaitable = _is_awaitable  # type: ignore[attr-defined]
        inspect.isgenerator = _is_generator  # type: ignore[attr-defined]
    # construct imports them, and traceback; hashlib loads OpenSSL.
    for name in ("pdb", "pickle", "linecache", "textwrap", "platform", "hashlib"):
        sys.modules.setdefault(name, _StandIn(name))
    platform = sys.modules["platform"]
    if isinstance(platform, _StandIn):
        platform.system = _system  # type: ignore[attr-defined]
    _import_pathlib()
    _import_without("shutil", "bz2", "lzma")  # of archives
    _compile_dataclasses_late()


def import_asyncio() -> None:
    """asyncio as it is on a Python without TLS, which no command uses: loading OpenSSL takes as long as starting a
    small guest (tests.bench start). Whoever imports ssl later gets it."""
    _import_without("asyncio", "ssl")


def import_uvloop() -> None:
    """uvloop without TLS if asyncio is without it: it then refuses (RuntimeError) to make a connection with it."""
    if "ssl" in sys.modules:
        importlib.import_module("uvloop")
        return
    tls = ModuleType("ssl")
    for name in ("MemoryBIO", "create_default_context"):
        setattr(tls, name, _without_tls)
    errors = ("SSLError", "SSLWantReadError", "SSLSyscallError", "SSLZeroReturnError", "CertificateError")
    for name in ("SSLContext", *errors):
        setattr(tls, name, type(name, (OSError,), {}))
    for name in ("SSL_ERROR_WANT_READ", "SSL_ERROR_WANT_WRITE", "SSL_ERROR_SYSCALL"):
        setattr(tls, name, 0)
    sys.modules["ssl"] = tls
    try:
        importlib.import_module("uvloop")
    finally:
        del sys.modules["ssl"]


def _without_tls() -> NoReturn:
    raise RuntimeError("the event loop of this command was loaded without TLS")


def _import_without(name: str, *others: str) -> None:
    """The module as where the others are missing. Whoever imports those later gets them."""
    hidden = [other for other in others if other not in sys.modules]
    for other in hidden:
        sys.modules[other] = None  # type: ignore[assignment]
    try:
        importlib.import_module(name)
    finally:
        for other in hidden:
            del sys.modules[other]


def _compile_dataclasses_late() -> None:
    """A method that dataclasses writes for a class is compiled at its first call: most of them never come to that, and
    there are hundreds (tests.bench state). From Python 3.13 on the module has no such function, and compiles faster."""
    import dataclasses

    create = getattr(dataclasses, "_create_fn", None)
    if create is not None:
        dataclasses._create_fn = functools.partial(_when_called, create)  # type: ignore[attr-defined]


def _when_called(create: Callable[..., Any], name: str, *how: Any, **more: Any) -> Callable[..., Any]:
    """The method `name`, made by `create` when it is first called; it then takes its place in the class."""
    made: Callable[..., Any] | None = None

    def method(*given: Any, **named: Any) -> Any:
        nonlocal made
        if made is None:
            made = create(name, *how, **more)
            made.__qualname__ = method.__qualname__
        for owner in type(given[0]).__mro__:
            if owner.__dict__.get(name) is method:
                setattr(owner, name, made)
        return made(*given, **named)

    method.__name__ = name
    return method


def _system() -> str:
    """platform.system()"""
    return os.uname().sysname


def _is_coroutine_function(function: Any) -> bool:
    """inspect.iscoroutinefunction()"""
    while True:
        if isinstance(function, MethodType):
            function = function.__func__
        elif type(function).__name__ == "partial" and hasattr(function, "func"):
            function = function.func
        else:
            return isinstance(function, FunctionType) and bool(function.__code__.co_flags & _CO_COROUTINE)


def _is_awaitable(value: Any) -> bool:
    """inspect.isawaitable()"""
    if isinstance(value, CoroutineType) or hasattr(type(value), "__await__"):
        return True
    code = getattr(value, "gi_code", None)
    return code is not None and bool(code.co_flags & _CO_ITERABLE_COROUTINE)


def _is_generator(value: Any) -> bool:
    """inspect.isgenerator()"""
    return isinstance(value, GeneratorType)


def _import_pathlib() -> None:
    """pathlib without urllib.parse and what that loads: only Path.as_uri() uses it."""
    if "pathlib" in sys.modules or "urllib.parse" in sys.modules:
        return
    parse = ModuleType("urllib.parse")
    parse.quote_from_bytes = _quote_from_bytes  # type: ignore[attr-defined]
    package = ModuleType("urllib")
    package.parse = parse  # type: ignore[attr-defined]
    sys.modules["urllib"], sys.modules["urllib.parse"] = package, parse
    try:
        importlib.import_module("pathlib")
    finally:
        del sys.modules["urllib"], sys.modules["urllib.parse"]


def _quote_from_bytes(data: bytes) -> str:
    from urllib.parse import quote_from_bytes

    return quote_from_bytes(data)
