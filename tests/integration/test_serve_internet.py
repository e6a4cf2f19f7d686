"""Sandboxes of `vmm serve --internet`: what each asks for is what it reaches. The internet is a namespace."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import netns, passt
from tests.support.passt import FAR
from tests.support.serve import Server, served

e2b = pytest.importorskip("e2b", reason="the package e2b is not installed: pip install '.[test]'")
pytestmark = [pytest.mark.debian, pytest.mark.root, pytest.mark.filterwarnings("default")]
OTHER = "10.214.7.2"
ONLINE = "for i in $(seq 300); do ip route | grep -q default && break; sleep 0.1; done; "


@pytest.fixture
def server(linux: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """One with an internet of two addresses, FAR and OTHER, both with a web server at port 8000."""
    netns.need("passt")
    passt.need()
    web = tmp_path / "web"
    web.mkdir()
    (web / "index.html").write_text("the internet\n")
    with passt.networks(tmp_path) as (_, far):
        asyncio.run(far.serve(web, "0.0.0.0", 8000))
        with served(tmp_path, "--internet") as server:
            for name, value in (("API_URL", server.url), ("SANDBOX_URL", server.url), ("API_KEY", "local")):
                monkeypatch.setenv(f"E2B_{name}", value)
            yield server


def reaches(box: Any, address: str) -> bool:
    command = f"{ONLINE} timeout 5 wget -q -O - http://{address}:8000/index.html || true"
    return bool(box.commands.run(command, timeout=120).stdout == "the internet\n")


def test_a_sandbox_has_the_internet_that_it_asks_for(server: Server) -> None:
    boxes = []
    for wish in ({}, {"network": {"allow_out": [FAR], "deny_out": ["0.0.0.0/0"]}}, {"allow_internet_access": False}):
        boxes.append(e2b.Sandbox.create(timeout=600, request_timeout=300, **wish))
    try:
        everywhere, fenced, alone = boxes
        assert reaches(everywhere, FAR) and reaches(everywhere, OTHER)
        assert reaches(fenced, FAR) and not reaches(fenced, OTHER)
        assert alone.commands.run("ls /sys/class/net").stdout.split() == ["lo"]
    finally:
        for box in boxes:
            box.kill()
