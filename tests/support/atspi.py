"""Operates the windows of one application by AT-SPI, as a screen reader does: a program for Debian's own Python.

    dbus-run-session -- /usr/bin/python3 atspi.py LOG PROGRAM [ARGUMENT …]

starts the program, whose output goes to the file LOG, and ends it at the end of the input.

Reads one JSON list on each line, [WHAT, WINDOW, ROLE, NAME, …], and answers each with a line of JSON. WINDOW is the
title of the window in which the widget is, NAME its name, its label, or the first line of its text; "" is any.

["wait", …]         until such a widget is shown: its whole text
["press", …]        its action (a button's click, a check box's change), once it has one that can be done
["select", …]       the row of a table that such a cell is in
["write", …, TEXT]  into an entry
["gone", …]         until no such widget is shown
["tree", …]         all that the window shows, for reading
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 60.0
"""Seconds that anything may take."""


class Windows:
    """What the applications of this session bus show."""

    def __init__(self) -> None:
        import gi

        gi.require_version("Atspi", "2.0")
        from gi.repository import Atspi, Gio

        # The bus of AT-SPI is started by the first who asks for it.
        bus = Gio.bus_get_sync(Gio.BusType.SESSION)
        bus.call_sync("org.a11y.Bus", "/org/a11y/bus", "org.a11y.Bus", "GetAddress", None, None, 0, -1, None)
        Atspi.init()
        self.api: Any = Atspi

    def shown(self, window: str = "") -> Iterator[Any]:
        """Every widget, in the order in which windows were opened and things stand in them."""
        desktop = self.api.get_desktop(0)
        waiting = [(widget, window == "") for widget in self._children(desktop)]
        while waiting:
            widget, inside = waiting.pop()
            try:
                if widget.get_role_name() != "application":
                    if not widget.get_state_set().contains(self.api.StateType.SHOWING):
                        continue
                    inside = inside or widget.get_name() == window
                    if inside:
                        yield widget
                waiting += [(child, inside) for child in self._children(widget)]
            except self._error():
                continue  # it went while it was looked at

    def text(self, widget: Any) -> str:
        """What it shows: its text, or its name."""
        text = ""
        if "Text" in widget.get_interfaces():
            text = self.api.Text.get_text(widget, 0, self.api.Text.get_character_count(widget))
        return text or widget.get_name() or ""

    def labels(self, widget: Any) -> list[str]:
        """What stands beside it."""
        wanted = self.api.RelationType.LABELLED_BY
        relations = [relation for relation in widget.get_relation_set() if relation.get_relation_type() == wanted]
        return [self.text(relation.get_target(0)) for relation in relations]

    def find(self, window: str, role: str, name: str) -> Any | None:
        """The first that is shown."""
        for widget in self.shown(window):
            try:
                if widget.get_role_name() != role:
                    continue
                if name in ("", widget.get_name(), self.text(widget).split("\n")[0], *self.labels(widget)):
                    return widget
            except self._error():
                continue
        return None

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """What the condition gives once it holds. Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}; there is:\n{self.tree()}")
            time.sleep(0.1)
        return value

    def press(self, window: str, role: str, name: str) -> str:
        """The first one that is sensitive; what was done with it."""
        found = self.until(lambda: self._ready(window, role, name), f"no {role} {name!r} can be pressed in {window!r}")
        names = [self.api.Action.get_action_name(found, number) for number in range(found.get_n_actions())]
        wanted = next(name for name in ("activate", "click", "toggle", *names) if name in names)
        self.api.Action.do_action(found, names.index(wanted))
        return wanted

    def _ready(self, window: str, role: str, name: str) -> Any | None:
        found = self.find(window, role, name)
        if found is None or not found.get_state_set().contains(self.api.StateType.SENSITIVE):
            return None
        return found if found.get_n_actions() else None

    def select(self, cell: Any) -> bool:
        """The row of a tree in which this cell is."""
        table = row = cell
        while "Table" not in table.get_interfaces():
            row, table = table, table.get_parent()
        number = self.api.Table.get_row_at_index(table, row.get_index_in_parent())
        return bool(self.api.Table.add_row_selection(table, number))

    def tree(self, window: str = "") -> str:
        """A line for each widget with a name or a text."""
        lines = []
        for widget in self.shown(window):
            try:
                if text := self.text(widget):
                    lines.append(f"{widget.get_role_name()}: {text!r}")
            except self._error():
                continue
        return "\n".join(lines)

    def do(self, what: str, window: str, role: str = "", name: str = "", text: str = "") -> Any:
        """One request. Raises TimeoutError, ValueError."""
        if what == "tree":
            return self.tree(window)
        if what == "gone":
            return self.until(lambda: self.find(window, role, name) is None, f"{role} {name!r} stays")
        if what == "press":
            return self.press(window, role, name)
        widget = self.until(lambda: self.find(window, role, name), f"no {role} {name!r} in {window!r}")
        if what == "wait":
            return self.text(widget)
        if what == "select":
            return self.select(widget)
        if what == "write":
            return bool(self.api.EditableText.set_text_contents(widget, text))
        raise ValueError(what)

    def _children(self, widget: Any) -> list[Any]:
        """The last first."""
        found = []
        for number in reversed(range(widget.get_child_count())):
            try:
                found.append(widget.get_child_at_index(number))
            except self._error():
                continue
        return [child for child in found if child is not None]

    def _error(self) -> type[BaseException]:
        from gi.repository import GLib

        return GLib.Error  # type: ignore[no-any-return]


def main() -> None:
    """Until the end of the input."""
    windows = Windows()
    with open(sys.argv[1], "wb") as log, subprocess.Popen(sys.argv[2:], stdout=log, stderr=log) as program:
        for line in sys.stdin:
            try:
                answer = {"value": windows.do(*json.loads(line))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
        program.kill()


if __name__ == "__main__":
    main()
