"""Domains that end while a client's call waits for something else."""

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from vmm.libvirt.domain import Domain
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.machines import end_waiting, waiting


def test_a_transient_domain_that_has_ended_is_no_domain() -> None:
    domain = Domain("brief", uuid.uuid4())
    for look in (lambda: domain.spec, lambda: domain.xml("/usr/bin/vmm"), lambda: domain.xml("vmm", inactive=True)):
        with pytest.raises(LibvirtError, match="'brief'") as error:
            look()
        assert error.value.code == Code.NO_DOMAIN


def test_a_process_that_waits_for_a_machine_is_found_by_its_log_and_ended(tmp_path: Path) -> None:
    script = "import signal, sys; print(flush=True); signal.pause()"
    for word, names in (("receive", ["nomad"]), ("run", [])):
        with (tmp_path / "nomad.log").open("wb") as log, subprocess.Popen(
            [sys.executable, "-c", script, word, "--name", "nomad"], stdout=subprocess.PIPE, stderr=log
        ) as process:
            try:
                assert process.stdout is not None and process.stdout.readline()
                assert waiting(tmp_path) == [(process.pid, name) for name in names]
                assert waiting(tmp_path / "other") == []
                end_waiting(process.pid, "another")
                assert process.poll() is None
                if names:
                    end_waiting(process.pid, "nomad")
                    assert process.wait(60) == -9
            finally:
                process.kill()
