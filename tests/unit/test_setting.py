"""What `vmm set` says of what holds now."""

from __future__ import annotations

from typing import Any

import pytest

from cli import setting

NONE: dict[str, Any] = {"limits": {}, "policies": {}}


@pytest.mark.parametrize(
    ("given", "answer", "said"),
    [
        ("net0,allow=a.example", {**NONE, "policies": {"net0": {"allow": "a.example", "deny": "", "dns": ""}}},
         "net0: allow=a.example"),
        ("net0,allow=", NONE, "net0: no policy"),
        ("net0,bps-in=0", NONE, "web: no limits"),
        ("net0,bps-in=5", {**NONE, "limits": {"net0": {"bps-in": 5}}}, "net0: bps-in=5"),
        ("net0,allow=,bps-in=5", {**NONE, "limits": {"net0": {"bps-in": 5}}}, "net0: bps-in=5|net0: no policy"),
    ],
)  # fmt: skip
def test_what_holds_is_said(monkeypatch: pytest.MonkeyPatch, given: str, answer: Any, said: str) -> None:
    lines: list[str] = []
    monkeypatch.setattr(setting, "say", lines.append)
    monkeypatch.setattr(setting, "find", lambda name: name)
    monkeypatch.setattr(setting, "request", lambda *_, **__: answer)
    setting.set_machine("web", cpus=None, memory=None, disks=[], nets=[given], json=False)
    assert "|".join(lines) == said
