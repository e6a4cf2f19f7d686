"""`python -m tests.bench [NAME...]`: run the measurements, print a table, write bench.json.

A bench is a module `tests.bench.bench_<name>` with `rows()`, which yields mappings: "name", "value", "unit"; optional
"goal" (a number), "better" ("less" is the default, or "more") and "note". A bench that cannot run here yields a row
with value None and the reason as its note. Timings are reported, never asserted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

Row = Mapping[str, object]


def benches() -> list[str]:
    """The names of all benches."""
    folder = str(Path(__file__).parent)
    return sorted(info.name[6:] for info in pkgutil.iter_modules([folder]) if info.name.startswith("bench_"))


def verdict(row: Row) -> str:
    value, goal = row.get("value"), row.get("goal")
    if not isinstance(value, int | float) or not isinstance(goal, int | float):
        return ""
    met = value >= goal if row.get("better") == "more" else value <= goal
    return f"{'≥' if row.get('better') == 'more' else '≤'} {goal:g} {'met' if met else 'MISSED'}"


def shown(row: Row) -> str:
    value = row.get("value")
    number = "–" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)
    line = f"  {row.get('name', '')!s:<58} {number:>12} {row.get('unit', '')!s:<6} {verdict(row)}"
    return f"{line.rstrip()}  {row['note']}" if row.get("note") else line.rstrip()


def host() -> dict[str, object]:
    model = ""
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        pass
    return {
        "processor": model,
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "time": time.time(),
    }


def run(name: str) -> list[dict[str, object]]:
    """The rows of one bench; an exception becomes a row, so that the others still run."""
    found: list[dict[str, object]] = []
    try:
        module = importlib.import_module(f"tests.bench.bench_{name}")
        rows: Iterable[Row] = module.rows()
        for row in rows:
            found.append({"bench": name, **row})
            print(shown(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        found.append({"bench": name, "name": "failed", "value": None, "unit": "", "note": repr(error)})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="measure, print, write bench.json")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(benches())}; default: all")
    parser.add_argument("--output", default="bench.json", help="where the numbers go (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(benches()):
        parser.error(f"no bench named {', '.join(sorted(unknown))}; there are {', '.join(benches())}")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # commands find modules compiled, as installed ones do
    described = host()
    rows = []
    for name in arguments.names or benches():
        print(f"{name}:", flush=True)
        rows += run(name)
    report = json.dumps({"host": described, "rows": rows}, indent=1, ensure_ascii=False)
    Path(arguments.output).write_text(report + "\n")
    return 1 if any(row["name"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
