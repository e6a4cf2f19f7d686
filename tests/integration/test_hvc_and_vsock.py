"""A shell on virtio's console, and echoes over vsock that the guest and the host begin, on each core."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.debian import PATIENCE

pytestmark = [pytest.mark.debian]
SECONDS = 90 * PATIENCE

PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

/* connect PORT TEXT: sends TEXT to the host, prints what comes back. listen PORT: sends back what one client sends. */
int main(int argc, char **argv)
{
    char buffer[65536];
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_port = atoi(argv[2]) };
    int s = socket(AF_VSOCK, SOCK_STREAM, 0), listening = !strcmp(argv[1], "listen");
    address.svm_cid = listening ? VMADDR_CID_ANY : VMADDR_CID_HOST;
    if (listening) {
        if (bind(s, (void *)&address, sizeof address) || listen(s, 1))
            return 1;
        puts("listening");
        fflush(stdout);
        s = accept(s, 0, 0);
    } else if (connect(s, (void *)&address, sizeof address) || write(s, argv[3], strlen(argv[3])) < 0) {
        return 2;
    } else {
        shutdown(s, SHUT_WR);
    }
    for (ssize_t n; (n = read(s, buffer, sizeof buffer)) > 0;)
        for (ssize_t at = 0, m; at < n; at += m)
            if ((m = write(listening ? s : 1, buffer + at, n - at)) <= 0)
                return 3;
    return 0;
}
"""


async def test_a_shell_on_hvc0(stock_core: Any) -> None:
    """The console is virtio's from the kernel's command line on; what is typed goes there."""
    async with vmm.run(
        "linux", core=stock_core, hvc=True, nets=(), cmdline="console=hvc0 panic=-1 no_timer_check", timeout=SECONDS
    ) as machine:
        await machine.console.expect(rb"linux:~# ", timeout=SECONDS)
        await machine.console.write("tty; echo $((6 * 7)).\n")
        await machine.console.expect(rb"/dev/hvc0\r?\n42\.", timeout=SECONDS)
        await machine.console.write("poweroff -f\n")
        outcome = await machine.wait()
    assert outcome.reason is vmm.Reason.SHUTDOWN


async def test_vsock_echo_both_ways(tmp_path: Path, stock_core: Any) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, program, socket = tmp_path / "vsock.c", tmp_path / "vsock", tmp_path / "v"
    source.write_text(PROGRAM)
    made = subprocess.run([compiler, "-static", "-O1", "-o", program, source], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs a static C library: {made.stderr.strip()[-200:]}")
    body = os.urandom(1 << 20)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"the host heard: " + await reader.read())
        writer.close()

    async with vmm.run("linux", core=stock_core, vsock=socket, nets=(), timeout=SECONDS) as machine:
        await machine.copy_in(program, "/vsock")
        await machine.exec("chmod", "755", "/vsock", check=True)
        server = await asyncio.start_unix_server(answer, f"{socket}_5000")
        done = await machine.exec("/vsock", "connect", "5000", "a guest's word", timeout=SECONDS)
        assert (done.status, done.stdout) == (0, b"the host heard: a guest's word")
        server.close()
        async with await machine.start_process("/vsock", "listen", "6000") as process:
            assert b"listening" in await anext(aiter(process.stdout))
            reader, writer = await asyncio.open_unix_connection(socket)
            writer.write(b"CONNECT 6000\n")
            assert (await asyncio.wait_for(reader.readline(), SECONDS)).startswith(b"OK ")
            writer.write(body)
            assert await asyncio.wait_for(reader.readexactly(len(body)), SECONDS) == body
            writer.close()
            await writer.wait_closed()
            assert await process.wait() == 0
        machine.kill()
