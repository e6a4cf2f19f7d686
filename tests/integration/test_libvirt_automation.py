"""Programs that manage many machines, unmodified: Ansible's modules for libvirt, and the library of Terraform's
provider."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import ROOT
from tests.support.libvirtd import DaemonProcess, needs_virsh, tiny

pytestmark = needs_virsh
GO_LIBRARY = Path("/usr/share/gocode/src/github.com/digitalocean/go-libvirt")
SYSTEM_PYTHON = "/usr/bin/python3"
"""Debian's python3-libvirt belongs to Debian's Python."""


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as running:
        yield running


PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  module_defaults:
    community.libvirt.virt: &uri {{uri: "{uri}"}}
    community.libvirt.virt_net: *uri
    community.libvirt.virt_pool: *uri
  tasks:
    - community.libvirt.virt: {{command: define, xml: "{{{{ lookup('file', '{xml}') }}}}"}}
    - community.libvirt.virt: {{name: a, state: running, autostart: true}}
    - community.libvirt.virt: {{command: list_vms, state: running}}
      register: running
    - community.libvirt.virt: {{command: info}}
      register: info
    - community.libvirt.virt: {{name: a, command: status}}
      register: status
    - community.libvirt.virt: {{name: a, command: get_xml}}
      register: xml
    - community.libvirt.virt: {{name: a, command: pause}}
    - community.libvirt.virt: {{name: a, command: unpause}}
    - community.libvirt.virt: {{command: nodeinfo}}
    - community.libvirt.virt: {{command: freemem}}
    - community.libvirt.virt: {{command: virttype}}
    - community.libvirt.virt: {{name: a, state: destroyed}}
    - community.libvirt.virt: {{name: a, command: undefine}}
    - community.libvirt.virt: {{command: list_vms}}
      register: left
    - community.libvirt.virt_net: {{command: list_nets}}
      register: nets
    - community.libvirt.virt_net: {{command: facts}}
    - community.libvirt.virt_net: {{name: default, state: active}}
    - community.libvirt.virt_net:
        name: cut-off
        command: define
        xml: "<network><name>cut-off</name><bridge name='lvansible'/></network>"
    - community.libvirt.virt_net: {{name: cut-off, command: undefine}}
    - community.libvirt.virt_pool:
        name: p
        command: define
        xml: "<pool type='dir'><name>p</name><target><path>{directory}/p</path></target></pool>"
    - community.libvirt.virt_pool: {{name: p, command: build}}
    - community.libvirt.virt_pool: {{name: p, state: active}}
    - community.libvirt.virt_pool: {{name: p, autostart: true}}
    - community.libvirt.virt_pool: {{command: list_pools}}
      register: pools
    - community.libvirt.virt_pool: {{command: info}}
      register: pool
    - community.libvirt.virt_pool: {{name: p, state: inactive}}
    - community.libvirt.virt_pool: {{name: p, state: undefined}}
    - copy:
        dest: "{directory}/told.json"
        content: "{{{{ {{'running': running.list_vms, 'info': info, 'status': status.status, 'xml': xml.get_xml,
          'left': left.list_vms, 'nets': nets.list_nets, 'pools': pools.list_pools, 'pool': pool.pools}} | to_json }}}}"
"""


@pytest.mark.slow
def test_ansible(daemon: DaemonProcess, tmp_path: Path) -> None:
    program = shutil.which("ansible-playbook", path="/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("ansible-playbook is not installed (ansible)")
    modules = subprocess.run([SYSTEM_PYTHON, "-c", "import libvirt, lxml"], capture_output=True)
    if modules.returncode:
        pytest.skip("Debian's Python has no libvirt or lxml (python3-libvirt, python3-lxml)")
    (tmp_path / "a.xml").write_text(tiny("a"))
    (tmp_path / "play.yml").write_text(
        PLAYBOOK.format(uri=daemon.uri("qemu"), xml=tmp_path / "a.xml", directory=tmp_path)
    )
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(tmp_path), "ANSIBLE_LOCALHOST_WARNING": "false",
        "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    done = subprocess.run(
        [program, "-i", "localhost,", "-e", f"ansible_python_interpreter={SYSTEM_PYTHON}", str(tmp_path / "play.yml")],
        capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path,
    )  # fmt: skip
    if "couldn't resolve module" in done.stderr:
        pytest.skip("ansible has no collection community.libvirt")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["running"] == ["a"]
    assert told["info"]["a"]["state"] == told["status"] == "running"
    assert told["info"]["a"]["autostart"] == 1
    assert "<name>a</name>" in told["xml"]
    assert told["left"] == []
    assert told["nets"] == ["default"]
    assert told["pools"] == ["p"]
    assert told["pool"]["p"]["status"] == "running"
    assert daemon.virsh("net-list", "--all", "--name") == "default"
    assert daemon.virsh("pool-list", "--all", "--name") == ""


def test_what_terraforms_provider_calls(daemon: DaemonProcess, tmp_path: Path) -> None:
    """By go-libvirt: pools, volumes with contents, domains, networks, and the errors that it looks for."""
    go = shutil.which("go")
    if go is None or not GO_LIBRARY.is_dir():
        pytest.skip("go or go-libvirt is not installed (golang-go, golang-github-digitalocean-go-libvirt-dev)")
    (tmp_path / "main.go").write_text((ROOT / "tests" / "support" / "provider.go").read_text())
    environment = os.environ | {
        "GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "",
    }  # fmt: skip
    built = subprocess.run(
        [go, "build", "-o", "provider", "main.go"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [tmp_path / "provider", daemon.socket, tmp_path, tiny("tf")], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == [
        "version 9000000 true",
        "volume 65536 true",
        "running 1 1",
        "network default",
        "missing true",
        "done",
    ], done.stdout + done.stderr
    assert daemon.virsh("list", "--all", "--name") == ""
    assert daemon.virsh("pool-list", "--all", "--name") == ""
