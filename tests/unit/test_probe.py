"""cpu/select.py and cpu/kvm/probe.py: which core runs, why, and what helps."""

import pytest

from cpu import select
from cpu.contract import Capability, Probe, VmConfig
from cpu.errors import ConfigError, CpuError, HostError
from cpu.kvm import probe as kvm_probe
from cpu.kvm import system as kvm_system

NOTHING = frozenset()
ALL = frozenset(Capability)


@pytest.fixture
def host(monkeypatch):
    """host(kvm=Probe, soft=Probe) replaces what this host has."""

    def replace(kvm, soft):
        monkeypatch.setattr(select, "_probe_kvm", lambda: kvm)
        monkeypatch.setattr(select, "_probe_soft", lambda: soft)

    return replace


def test_kvm_is_preferred_when_it_has_what_the_guest_needs(host):
    host(Probe(True, ALL, "fine"), Probe(True, ALL, "soft"))
    assert select.choose("auto", frozenset({Capability.STOCK_KERNELS})).name == "kvm"


def test_soft_runs_what_this_kvm_cannot_and_says_why(host):
    host(Probe(True, NOTHING, "small guests only"), Probe(True, ALL, "any host"))
    choice = select.choose("auto", frozenset({Capability.STOCK_KERNELS}))
    assert choice.name == "soft"
    assert "kvm lacks stock-kernels" in choice.reason
    assert select.choose("auto").name == "kvm"


def test_without_any_core_the_reasons_are_told(host):
    host(Probe(False, NOTHING, "there is no /dev/kvm", "load it"), Probe(False, NOTHING, "not built"))
    with pytest.raises(HostError, match="there is no /dev/kvm.*not built"):
        select.choose("auto")
    with pytest.raises(HostError, match="load it"):
        select.choose("kvm")


def test_a_named_core_must_have_what_is_needed(host):
    host(Probe(True, NOTHING, "small guests only", "nested"), Probe(True, ALL, ""))
    with pytest.raises(HostError, match="virtual-clock"):
        select.choose("kvm", frozenset({Capability.VIRTUAL_CLOCK}))


def test_a_core_with_too_few_vcpus_is_told_with_its_limit(host):
    host(Probe(True, ALL, "fine", max_vcpus=8), Probe(True, ALL, "soft", max_vcpus=16))
    assert select.choose("auto", vcpus=8).name == "kvm"
    choice = select.choose("auto", vcpus=16)
    assert choice.name == "soft"
    assert "kvm has 8 vCPUs a machine" in choice.reason
    for core, limit in (("kvm", 8), ("soft", 16), ("auto", 16)):
        with pytest.raises(ConfigError, match=f"cpus: 17 is more than the {limit} "):
            select.choose(core, vcpus=17)


def test_the_software_cores_limit_is_what_it_says():
    found = select.probe("soft")
    system = select.open_system(select.Choice("soft", found, ""))
    vm = system.create_vm(VmConfig(vcpus=found.max_vcpus))
    assert len([vm.create_vcpu(index) for index in range(found.max_vcpus)]) == found.max_vcpus
    vm.close()
    with pytest.raises(CpuError):
        system.create_vm(VmConfig(vcpus=found.max_vcpus + 1))


@pytest.mark.kvm
def test_kvms_limit_is_what_the_host_says():
    found = select.probe("kvm")
    if not found.available:
        pytest.skip(found.reason)
    assert 1 <= found.max_vcpus <= 64


def test_an_unknown_core_is_a_configuration_error():
    with pytest.raises(ConfigError, match="kvm, soft"):
        select.choose("xen")


def test_a_missing_device_is_named_with_its_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(kvm_system, "DEVICE", str(tmp_path / "kvm"))
    found = select.probe("kvm")
    assert not found.available
    assert "there is no" in found.reason
    assert found.cure


def test_a_file_in_its_place_is_refused(monkeypatch, tmp_path):
    (tmp_path / "kvm").write_text("")
    monkeypatch.setattr(kvm_system, "DEVICE", str(tmp_path / "kvm"))
    found = select.probe("kvm")
    assert not found.available
    assert "not a device" in found.reason


def test_a_device_that_is_not_kvm_is_refused(monkeypatch):
    monkeypatch.setattr(kvm_system, "DEVICE", "/dev/null")
    found = select.probe("kvm")
    assert not found.available
    assert "/dev/null" in found.reason


def test_no_permission_names_the_group(monkeypatch):
    monkeypatch.setattr(kvm_system, "DEVICE", "/dev/null")
    monkeypatch.setattr(select.os, "access", lambda *_: False)
    found = select.probe("kvm")
    assert not found.available
    assert "kvm" in found.cure


def test_a_finding_is_remembered_for_this_boot_only(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kvm_probe, "_boot", lambda: "1 first")
    assert kvm_probe._recall() is None
    found = frozenset({Capability.NMI, Capability.REAL_MODE})
    kvm_probe._remember(found)
    assert kvm_probe._recall() == found
    monkeypatch.setattr(kvm_probe, "_boot", lambda: "1 second")
    assert kvm_probe._recall() is None


@pytest.mark.parametrize("text", ["", "garbage", "1 first\nno-such-capability\n", "\xff"])
def test_a_broken_cache_is_ignored(monkeypatch, tmp_path, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kvm_probe, "_boot", lambda: "1 first")
    (tmp_path / "loopvisor").mkdir()
    (tmp_path / "loopvisor" / "kvm-capabilities").write_bytes(text.encode("latin-1"))
    assert kvm_probe._recall() is None


@pytest.mark.kvm
def test_what_is_examined_is_a_set_of_capabilities(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not select.probe("kvm").available:
        pytest.skip("no KVM here")
    system = kvm_system.KvmSystem()
    first = system.capabilities()
    system.close()
    assert Capability.REAL_MODE in first
    assert select.probe("kvm").capabilities == first
