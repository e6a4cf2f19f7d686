"""The software core's micro-op handlers end in tail calls: the object code as it was built says so.

A handler that calls its successor instead of jumping to it works, and overflows the host's stack in a long loop of the
guest; the compiler falls back to that silently when, for example, a local variable's address escapes. Handlers stand in
a section of their own (cpu/soft/ops/uop.h), so objdump finds all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

import cpu._core

CALLERS = {"call_helper", "call_helper_store", "call_helper_end", "avx_other", "avx_other_store", "vec_rr"}
"""Handlers that call a function through a pointer in the micro-op, which returns."""
NORETURN = {"divide_error", "vex_unavailable"}
LINE = re.compile(r"^\s+[0-9a-f]+:\s+(.*)$")
FUNCTION = re.compile(r"^[0-9a-f]+ <([^>]+)>:$")
TARGET = re.compile(r"<([^>+]+)(?:\+0x[0-9a-f]+)?>$")
STACK = re.compile(r"^(?:sub|add|lea)\s.*,%rsp")


def functions(section: str) -> dict[str, list[str]]:
    """Name -> instructions of every function in a section of the extension module."""
    done = subprocess.run(["objdump", "-d", "--no-show-raw-insn", "-j", section, str(cpu._core.__file__)],
                          capture_output=True, text=True, check=True, timeout=120)
    found: dict[str, list[str]] = {}
    body: list[str] = []
    for line in done.stdout.splitlines():
        if name := FUNCTION.match(line):
            body = found.setdefault(name[1], [])
        elif instruction := LINE.match(line):
            body.append(instruction[1].strip())
    return found


@pytest.fixture(scope="module")
def handlers() -> dict[str, list[str]]:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    if os.environ.get("LOOPVISOR_SANITIZE"):
        pytest.skip("a sanitized build has calls of the sanitizer everywhere")
    found = functions("soft_handlers")
    assert len(found) > 500
    return found


def target(instruction: str) -> str:
    """The function a direct jump or call goes to, without what the compiler or linker appended."""
    match = TARGET.search(instruction)
    return match[1].split(".")[0].split("@")[0] if match else ""


def test_every_handler_ends_in_a_tail_call(handlers: dict[str, list[str]]) -> None:
    """It jumps to the next handler through a pointer, or to another function that does."""
    for name, body in handlers.items():
        own = name.split(".")[0]
        jumps = [i for i in body if re.match(r"(?:bnd |notrack )?jmp\s", i)]
        assert any("*" in i for i in jumps) or any(target(i) not in ("", own) for i in jumps), name


def test_no_handler_calls_a_handler(handlers: dict[str, list[str]]) -> None:
    slow = functions("soft_slow")
    for name, body in handlers.items():
        for instruction in (i for i in body if re.match(r"(?:notrack )?call\s", i)):
            if "*" in instruction:
                assert name in CALLERS or "(%rip)" in instruction, f"{name}: {instruction}"
            else:
                callee = target(instruction)
                assert callee not in handlers, f"{name}: {instruction}"
                assert callee not in slow or callee in NORETURN, f"{name}: {instruction}"


def test_handlers_give_the_stack_back(handlers: dict[str, list[str]]) -> None:
    """What few save a register do so around all their exits; without calls nothing else is on the stack."""
    for name, body in handlers.items():
        if not any(re.match(r"(?:notrack )?call\s", i) for i in body):
            if any(i.startswith("push") for i in body):
                exits = [i for i, text in enumerate(body) if re.match(r"(?:notrack )?jmp\s+\*|ret", text)]
                assert any(i.startswith("pop") for i in body[: exits[0]]), f"{name}: {body}"
            assert not [i for i in body if STACK.match(i) and "%rsp" in i], f"{name}: {body}"


def test_slow_paths_go_on_with_a_jump() -> None:
    """What the cold variants of the handlers call is never the next micro-op."""
    if shutil.which("objdump") is None or os.environ.get("LOOPVISOR_SANITIZE"):
        pytest.skip("objdump is not installed, or the build is sanitized")
    for name, body in functions("soft_slow").items():
        calls = [i for i in body if re.match(r"(?:notrack )?call\s", i)]
        assert not any("*" in i and "(%rip)" not in i for i in calls), f"{name}: {calls}"
