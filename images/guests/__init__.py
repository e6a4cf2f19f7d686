"""Our own tiny guests: a few KiB each, in assembly beside this file, built with the package."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
WITH_PIT = frozenset({"timer"})
"""Guests that use a device which the bare platform lacks."""


def names() -> list[str]:
    """Every tiny guest's name."""
    return sorted(path.stem for path in HERE.glob("*.bin"))


def description(name: str) -> str:
    """What a tiny guest does: the first sentence of its source."""
    try:
        text = (HERE / f"{name}.S").read_text().partition("/*")[2].partition("*/")[0]
    except OSError:
        return "tiny guest"
    return " ".join(word for word in text.split() if word != "*").partition(". ")[0].rstrip(".")


def path(name: str) -> Path:
    """The binary of a tiny guest; KeyError if there is none of that name."""
    found = HERE / f"{name}.bin"
    if "/" in name or not found.is_file():
        raise KeyError(name)
    return found
