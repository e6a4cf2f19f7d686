"""Counters as Prometheus reads them (text exposition format 0.0.4)."""

from __future__ import annotations

import re

from vmm.management.control import metrics

SAMPLE = re.compile(r'([a-z_]+)\{machine="([^"]+)",kind="([a-z.-]+)"\} (\d+)')


def test_every_counter_is_one_sample_after_help_and_type() -> None:
    stats = {"exit.port-in": 3, "exit.mmio-write": 0, "posted": 19_344}
    text = metrics("one", stats)
    assert text.endswith("\n")
    lines = text.splitlines()
    assert lines[0].startswith("# HELP loopvisor_events_total ") and lines[1] == "# TYPE loopvisor_events_total counter"
    samples = [SAMPLE.fullmatch(line) for line in lines[2:]]
    assert all(match and match[1] == "loopvisor_events_total" and match[2] == "one" for match in samples)
    assert {match[3]: int(match[4]) for match in samples if match} == stats
