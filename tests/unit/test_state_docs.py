"""docs/state.md lists every state as it is declared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "states.py"


def test_the_table_of_states_is_true() -> None:
    spec = importlib.util.spec_from_file_location("states", SCRIPT)
    assert spec is not None and spec.loader is not None
    states = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(states)
    assert states.PAGE.read_text() == states.page(), "run: python docs/states.py"
