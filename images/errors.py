"""Errors of the image builder; each message is one line that names the input and the way out."""

from __future__ import annotations


class ImageError(Exception):
    """An image cannot be had: `kind` says whose fault it is ("config": unknown name or recipe; "host": a tool, a
    package or the disk)."""

    def __init__(self, message: str, kind: str = "host") -> None:
        super().__init__(message)
        self.kind = kind
