"""`python -m tests.support.lanes N [ARGUMENT...]`: the tests in N processes of pytest at once, as in `make test`.

Every process collects all tests. Before it runs those of a file it claims the file, by making an empty file that must
not be there yet; so each is run once, its fixtures are used by one process, and who is done early takes more. The first
process's output is shown as it comes, that of the others when they have ended, then one line of what all of them did.
Failures of all are what `pytest --last-failed` runs again, and so are tests that a process claimed and did not finish
because it died. (pytest-xdist does the like, but was seen to wait for ever after a process had died.)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

PLACE, LANE = "LOOPVISOR_LANES", "LOOPVISOR_LANE"
"""Set for each process: the directory that they share, and its number."""
CLAIMED, FINISHED, ENDED = "claimed", "finished", "ended"
"""What a process writes down beside its tests' outcomes."""


class Lane:
    """The plugin of one process."""

    def __init__(self, place: Path, number: str) -> None:
        self._place = place
        self._told = place / f"told-{number}"

    def _tell(self, what: str, nodes: list[str]) -> None:
        """At once, for this process may die in its next test."""
        with self._told.open("a") as file:
            file.write("".join(f"{what} {node}\n" for node in nodes))

    def _claim(self, items: list[pytest.Item]) -> bool:
        """All tests of a file."""
        try:
            (self._place / items[0].location[0].replace("/", "+")).touch(exist_ok=False)
        except FileExistsError:
            return False
        self._tell(CLAIMED, [item.nodeid for item in items])
        return True

    def _chosen(self, items: list[pytest.Item]) -> Iterator[pytest.Item]:
        """Those of files that no other process has claimed; a file is claimed when its first test is asked for."""
        files: dict[str, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.location[0], []).append(item)
        for found in files.values():
            if self._claim(found):
                yield from found

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest says which files cannot be collected, or which tests there are
        chosen = self._chosen(session.items)
        item = next(chosen, None)
        while item is not None:
            following = next(chosen, None)  # whose fixtures are kept; so a file is claimed one test early
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self._tell(FINISHED, [item.nodeid])
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            item = following
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped or report.when == "call":
            self._tell(report.outcome, [report.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(report.outcome, [report.nodeid])

    def pytest_sessionfinish(self) -> None:
        self._tell(ENDED, [""])


def pytest_configure(config: pytest.Config) -> None:
    """Only where main() started this process."""
    if place := os.environ.pop(PLACE, None):
        config.pluginmanager.register(Lane(Path(place), os.environ.pop(LANE)), "lane")


def read(told: Path) -> dict[str, list[str]]:
    """What a process wrote down: the tests of each kind."""
    found: dict[str, list[str]] = {}
    for line in told.read_text().splitlines() if told.exists() else []:
        what, _, node = line.partition(" ")
        found.setdefault(what, []).append(node)
    return found


def main(count: int, arguments: list[str]) -> int:
    """Run them in the working directory; 0 if all processes ended well."""
    cache = Path(".pytest_cache/v/cache/lastfailed")
    failed: dict[str, bool] = {}
    total: Counter[str] = Counter()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lanes-")))
        processes, outputs = [], []
        for number in range(count):
            outputs.append(stack.enter_context((place / f"output-{number}").open("w+")) if number else None)
            own = ["-p", "tests.support.lanes", "-o", f"cache_dir={place}/cache-{number}"]
            environment = {**os.environ, PLACE: str(place), LANE: str(number)}
            command = [sys.executable, "-m", "pytest", "-q", *own, *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=outputs[-1]))
        try:
            statuses = [process.wait() for process in processes]
        except KeyboardInterrupt:  # which they got as well
            statuses = [process.wait() for process in processes]
        for number, (status, output) in enumerate(zip(statuses, outputs, strict=True)):
            if output is not None:
                output.seek(0)
                sys.stdout.write(f"== process {number + 1} of {count}\n{output.read()}")
            told = read(place / f"told-{number}")
            broken = told.get("failed", [])
            if ENDED not in told:
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                left = [node for node in told.get(CLAIMED, []) if node not in set(told.get(FINISHED, []))]
                where = f" in {left[0]}" if left else ""
                before = "".join(f"\n  failed before: {node}" for node in broken)
                sys.stdout.write(f"\n== process {number + 1} of {count} died ({how}){where}{before}\n")
                broken = [*broken, *left]
                total["failed"] += 1
            failed |= dict.fromkeys(broken, True)
            total.update({outcome: len(told.get(outcome, [])) for outcome in ("passed", "failed", "skipped")})
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(failed, indent=2))
    sys.stdout.write(f"together: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped\n")
    return next((status if status > 0 else 1 for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
