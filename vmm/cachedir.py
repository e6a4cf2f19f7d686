"""Where what can be made again is kept: one directory for each user. *any thread*"""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(part: str) -> Path:
    """The directory of one kind of thing: $XDG_CACHE_HOME/loopvisor/PART, else below ~/.cache. It need not be there.
    A relative XDG_CACHE_HOME is ignored (XDG Base Directory Specification: "All paths [...] must be absolute")."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "loopvisor" / part
