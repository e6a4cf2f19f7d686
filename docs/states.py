"""The table of states in docs/state.md, made from the declarations: `python docs/states.py` writes it there.

tests/unit/test_state_docs.py holds the two equal.
"""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- states -->\n", "<!-- end of states -->\n"
PAGE = Path(__file__).resolve().parent / "state.md"


def table() -> str:
    """The table's text."""
    from vmm.state.declared import state_types
    from vmm.state.payload import describe

    lines = ["| kind | version | declared in | fields |", "|---|---|---|---|"]
    for state_type in state_types():
        fields = "; ".join(f"`{field}`: {text}" for field, text in describe(state_type)) or "none"
        where = state_type.__module__.replace(".", "/")
        lines.append(f"| {state_type.kind} | {state_type.version} | `{where}` | {fields.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/state.md as it should be."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
