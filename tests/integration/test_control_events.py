"""Events, reset and the power button by the control socket."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

import vmm
from vmm.management import control
from vmm.management.control import request
from vmm.management.registry import find

NAME = "control-events"
GUEST = {"path": Path(__file__).resolve().parents[2] / "images" / "guests" / "echo.bin"}


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


async def ask(command: str, **values: Any) -> dict[str, Any]:
    return await asyncio.to_thread(request, find(NAME), command, **values)


async def test_a_follower_hears_everything_in_order_to_the_end() -> None:
    async with vmm.run("echo", name=NAME) as vm:
        reader, writer = await asyncio.open_unix_connection(str(find(NAME).control))
        writer.write(b'{"command": "events"}\n')
        first = json.loads(await reader.readline())
        assert first["ok"] and first["state"] == "running"
        await ask("pause")
        await ask("resume")
        await ask("reset")
        heard = [json.loads(await asyncio.wait_for(reader.readline(), 30)) for _ in range(3)]
        vm.kill()
        heard += [json.loads(line) async for line in reader]
        writer.close()
    kinds = [event.get("state", event["event"]) for event in heard]
    assert kinds == ["paused", "running", "rebooted", "stopped", "ended"]
    assert heard[-1]["outcome"]["reason"] == "killed"


async def test_reset_starts_the_guest_again() -> None:
    async with vmm.run("echo", name=NAME) as vm:
        await vm.console.expect(rb"Ctrl-D ends\n", timeout=30)
        await vm.console.write(b"before")
        await vm.console.expect(rb"before", timeout=30)
        await ask("reset")
        await vm.console.expect(rb"Ctrl-D ends\n", timeout=30)
        await vm.console.write(b"after\x04")
        # The guest ends by a reboot of its own, for which nobody asked: that is an end, not another start.
        assert (await asyncio.wait_for(vm.wait(), 30)).reason.value == "reset"
        assert vm.console.text.count("Ctrl-D ends") == 2


async def test_no_power_button_is_told() -> None:
    async with vmm.run("echo", name=NAME):
        with pytest.raises(vmm.StateError, match="no power button"):
            await ask("shutdown")


async def test_a_paused_start_and_a_given_uuid() -> None:
    async with vmm.VirtualMachine(name=NAME, flat=GUEST, uuid="0E7D2A52-0b3c-4a36-9f3c-6a5f1f0b8f60") as vm:
        assert vm.config.uuid == "0e7d2a52-0b3c-4a36-9f3c-6a5f1f0b8f60"
        assert (await ask("config"))["config"]["uuid"] == vm.config.uuid
        assert (await ask("status"))["state"] == "paused"


async def test_a_client_that_asks_without_end() -> None:
    """Thousands of requests sent at once keep neither the loop nor other clients; they are all answered, in order."""
    count = 3000
    async with vmm.run("echo", name=NAME):
        reader, writer = await asyncio.open_unix_connection(str(find(NAME).control))
        writer.write(b'{"command": "nonsense"}\n' * count + b'{"command": "status"}\n')
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        turning = asyncio.ensure_future(turn())
        answers = [json.loads(await asyncio.wait_for(reader.readline(), 60)) for _ in range(count + 1)]
        assert turns > count, "the loop goes round between two answers"
        turning.cancel()
        writer.close()
    assert not any(answer["ok"] for answer in answers[:-1]) and answers[-1]["ok"]


async def test_more_clients_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one beyond is told, and served when another has gone."""
    monkeypatch.setattr(control, "CLIENTS_MAX", 3)
    async with vmm.run("echo", name=NAME):
        clients = [await asyncio.open_unix_connection(str(find(NAME).control)) for _ in range(3)]
        for reader, writer in clients:
            writer.write(b'{"command": "status"}\n')
            assert json.loads(await reader.readline())["ok"]
        with pytest.raises(vmm.HostError, match="3 clients are connected"):
            await ask("status")
        clients.pop()[1].close()
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(vmm.HostError):
                    assert (await ask("status"))["state"] == "running"
                    break
        for _, writer in clients:
            writer.close()


async def test_followers_that_leave_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CLIENTS_MAX", 4)
    async with vmm.run("echo", name=NAME):
        for _ in range(4):
            reader, writer = await asyncio.open_unix_connection(str(find(NAME).control))
            writer.write(b'{"command": "events"}\n')
            assert json.loads(await reader.readline())["ok"]
            writer.close()
        async with asyncio.timeout(60):
            while True:  # nothing happens in the machine meanwhile that it could tell them
                with contextlib.suppress(vmm.HostError):
                    await ask("status")
                    break
                await asyncio.sleep(0.1)


async def test_a_follower_that_ends_what_it_asks_still_hears() -> None:
    async with vmm.run("echo", name=NAME):
        reader, writer = await asyncio.open_unix_connection(str(find(NAME).control))
        writer.write(b'{"command": "events"}\n')
        writer.write_eof()
        assert json.loads(await reader.readline())["ok"]
        await asyncio.sleep(2 * control.LEFT_SECONDS)
        await ask("pause")
        assert json.loads(await asyncio.wait_for(reader.readline(), 30))["state"] == "paused"
        writer.close()
