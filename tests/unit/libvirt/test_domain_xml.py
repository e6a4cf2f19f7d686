"""Domain XML and configurations, both ways; what the machine does not have is refused by name."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_schema import samples
from vmm.config import WIRE, Config, ConsoleConfig, Disk, Net, limit_names
from vmm.convert import Checked
from vmm.errors import VmmError
from vmm.libvirt.domain_xml import read_domain
from vmm.libvirt.errors import LibvirtError
from vmm.libvirt.format import Live, domain_xml
from vmm.libvirt.host import domain_capabilities
from vmm.libvirt.metadata import get_metadata, set_metadata
from vmm.libvirt.spec import Spec, disk_name, spec_of

SHELL = """<domain type='qemu'><name>t</name><uuid>0e7d2a52-0b3c-4a36-9f3c-6a5f1f0b8f60</uuid>
<memory unit='MiB'>64</memory>%s<os><type arch='x86_64' machine='q35'>hvm</type><kernel>/k</kernel>%s</os>
%s<devices>%s</devices></domain>"""


def channels(name: str, channel: str) -> Path:
    return Path("/run/x") / name / channel


def read(text: str) -> Spec:
    return read_domain(text, channels)


def shell(*, life: str = "", system: str = "", top: str = "", devices: str = "") -> Spec:
    return read(SHELL % (life, system, top, devices))


FULL = Config.from_dict(
    {
        "name": "full",
        "uuid": "0e7d2a52-0b3c-4a36-9f3c-6a5f1f0b8f60",
        "core": "soft",
        "cpus": 3,
        "memory": "96M",
        "kernel": "/boot/k",
        "initrd": "/boot/i",
        "cmdline": "console=ttyS0 a='b' <&>",
        "append": "quiet",
        "disks": ["/a.img,ro,id=one,cache=none,io=threads,format=raw",
                  "/b.img,snapshot,queues=2,format=qcow2,transport=mmio"],
        "nets": ["user,forward=8080:80+2222:22,mac=52:54:00:00:00:01", "tap=tap7,queues=2,mac=52:54:00:00:00:02",
                 "unix=/n.sock,mac=52:54:00:00:00:03,pcap=/p.pcap", "user,optional,mac=52:54:00:00:00:04",
                 "switch=lan,mac=52:54:00:00:00:05,loss=0.5,seed=3",
                 "user,mac=52:54:00:00:00:06,allow=example.org:443,dns=10.0.0.53+[::1]:54"],
        "console": "socket=/c.sock,log=/c.log",
        "hvc": True,
        "ports": ["org.one=/1.sock", "two=/2.sock"],
        "vsock": "/v.sock",
        "agent": True,
        "rng": False,
        "timeout": 12.5,
        "seed": 7,
        "clock": "virtual",
        "epoch": 86400,
        "reboot": True,
        "hugepages": True,
    }
)  # fmt: skip


def test_a_configuration_survives_the_way_to_xml_and_back() -> None:
    spec = spec_of(FULL)
    again = read(domain_xml(spec, "/usr/bin/vmm"))
    assert again.config.to_dict() == FULL.to_dict()
    assert again == spec
    assert again.notes == ()


NEEDS: dict[tuple[type, str], dict[str, object]] = {
    **{(Net, name): {"kind": "switch", "target": "lan"} for name in WIRE},
    (Net, "queues"): {"kind": "tap", "target": "tap0"}, (Net, "target"): {"kind": "unix"}, (Config, "initrd"): {},
    (ConsoleConfig, "path"): {"kind": "socket"}, (Config, "flat"): {"kernel": None}, (Net, "kind"): {"target": "lan"},
    (Config, "memory"): {}, (Config, "platform"): {"rng": False},
    **{(kind, name): {name.removesuffix("_burst"): 1}
       for kind in (Disk, Net) for name in limit_names(kind) if name.endswith("_burst")},
}  # fmt: skip
SPECIAL = {
    "console": "none,log=/l",
    "disks": ["/d,format=raw"],
    "nets": ["user,mac=52:54:00:00:00:01"],
    "ports": ["a=/b"],
    "flat": "/f",
    "name": "g",
}


@pytest.mark.parametrize("name", [name for name in Config._converters if name != "uuid"])
def test_every_field_of_a_configuration_has_its_words(name: str) -> None:
    """Whoever adds an option finds it here if its XML does not read back."""
    base = {"name": "g", "uuid": str(FULL.uuid), "kernel": "/k"}
    for value in [SPECIAL[name]] if name in SPECIAL else samples(Config, name):
        config = Config.from_dict({**base, **NEEDS.get((Config, name), {}), name: value})
        assert read(domain_xml(spec_of(config), "/vmm")).config.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in (Disk, Net, ConsoleConfig) for name in kind._converters]
)
def test_every_field_of_a_part_has_its_words(kind: type[Checked], name: str) -> None:
    base = {Disk: {"path": "/d"}, Net: {"kind": "user", "mac": "52:54:00:00:00:01"}, ConsoleConfig: {"kind": "none"}}[
        kind
    ]
    where = {Disk: "disks", Net: "nets", ConsoleConfig: "console"}[kind]
    for value in samples(kind, name):
        if (kind, name, value) in (
            (ConsoleConfig, "kind", "stdio"),
            (ConsoleConfig, "kind", "socket"),
            (Net, "kind", "user"),
        ):
            continue  # a domain has no terminal; a path makes a socket; user networking has no target
        part = kind(**{**base, **NEEDS.get((kind, name), {}), name: value})
        config = Config.from_dict(
            {"name": "g", "uuid": str(FULL.uuid), "kernel": "/k", where: part if kind is ConsoleConfig else [part]}
        )
        assert read(domain_xml(spec_of(config), "/vmm")).config.to_dict() == config.to_dict()


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "cpus": st.integers(1, 64),
            "memory": st.integers(2, 4096).map(lambda mib: mib << 20),
            "cmdline": st.text(st.characters(categories=("L", "N", "P", "Zs"), max_codepoint=0x2FF)).map(str.strip),
            "reboot": st.booleans(),
            "rng": st.booleans(),
            "hvc": st.booleans(),
            "seed": st.none() | st.integers(0, 2**64 - 1),
            "epoch": st.none() | st.integers(0, 2**40),
        }
    )
)
def test_any_configuration_survives(values: dict[str, object]) -> None:
    config = Config.from_dict({"name": "g", "uuid": str(FULL.uuid), "kernel": "/k", **values})
    assert read(domain_xml(spec_of(config), "/vmm")).config == config


def test_flat_guests_and_the_bare_platform() -> None:
    config = Config.from_dict(
        {"name": "flat", "uuid": str(FULL.uuid), "platform": "bare", "rng": False,
         "flat": {"path": "/f.bin", "load": 0x100000, "entry": 0x100004, "mode": "long"}}
    )  # fmt: skip
    assert read(domain_xml(spec_of(config), "/vmm")).config == config


def test_what_is_live_is_said_of_the_live_only() -> None:
    spec = spec_of(FULL)
    live = domain_xml(spec, "/vmm", Live(7, "kvm"))
    assert live.startswith("<domain type='kvm' id='7'>") and "<alias name='virtio-disk0'/>" in live
    assert "id='7'" not in domain_xml(spec, "/vmm") and "<alias" not in domain_xml(spec, "/vmm")
    assert read(live).config.disks == FULL.disks


@pytest.mark.parametrize(
    ("xml", "model", "note"),
    [
        ("<cpu mode='host-passthrough' check='none' migratable='on'/>", "host", ""),
        ("<cpu mode='custom' match='exact'><model fallback='forbid'>x86-64-v2</model></cpu>", "v2", ""),
        ("<cpu mode='custom' match='exact'><model fallback='forbid'>x86-64-v3</model></cpu>", "v3", ""),
        ("<cpu mode='maximum'/>", "max", ""),
        ("<cpu mode='host-model'/>", "v2", "host-model"),
        ("<cpu><model>Skylake-Client</model></cpu>", "v2", "Skylake-Client"),
        ("", "v2", ""),
    ],
)
def test_processors(xml: str, model: str, note: str) -> None:
    spec = shell(top=xml)
    assert spec.config.cpu_model == model
    assert read(domain_xml(spec, "/vmm")).config.cpu_model == model
    assert note in " ".join(spec.notes) and bool(spec.notes) == bool(note)


def test_capabilities_say_which_processors_a_domain_can_have() -> None:
    """libvirt's "Domain capabilities" format, CPU configuration: models of mode custom, usable or not, and why not."""
    lacking: dict[str, list[str]] = {"v2": [], "v3": ["avx2", "lzcnt", "xsave-avx"], "max": [], "host": []}
    cpu = ElementTree.fromstring(domain_capabilities("/vmm", "qemu", "pc", lacking)).find("cpu")
    assert cpu is not None
    modes = {mode.attrib["name"]: mode for mode in cpu}
    assert {name: mode.attrib["supported"] for name, mode in modes.items()} == {
        "host-passthrough": "yes", "maximum": "yes", "host-model": "yes", "custom": "yes",
    }  # fmt: skip
    usable = {model.text: model.attrib["usable"] for model in modes["custom"].findall("model")}
    assert usable == {"x86-64-v2": "yes", "x86-64-v3": "no"}
    blockers = {one.attrib["model"]: [each.attrib["name"] for each in one] for one in modes["custom"].iter("blockers")}
    assert blockers == {"x86-64-v3": ["avx2", "abm"]}
    assert modes["host-model"].findtext("model") == "x86-64-v2"
    cpu = ElementTree.fromstring(domain_capabilities("/vmm", "kvm", "pc", {})).find("cpu")
    assert cpu is not None and {mode.attrib["supported"] for mode in cpu} == {"no"}


def test_libvirts_defaults() -> None:
    spec = shell()
    assert (spec.config.memory, spec.config.cpus, spec.config.reboot, spec.config.rng) == (64 << 20, 1, True, False)
    assert spec.config.core == "soft" and spec.config.cmdline is None
    nets = shell(devices="<interface type='network'><source network='default'/></interface>")
    assert nets.config.nets[0].kind == "user" and nets.nets[0].network == "default"
    assert (nets.config.nets[0].mac or "").startswith("52:54:00:")


DISPLAY = """<graphics type='spice' port='-1' tlsPort='-1' autoport='yes'><image compression='off'/></graphics>
<input type='tablet' bus='usb'/><video><model type='qxl'/></video>"""


def test_what_clients_write_unasked_is_taken_and_told() -> None:
    """virt-install --osinfo detect=off: it knows nothing of the guest's system."""
    spec = shell(
        devices=DISPLAY
        + """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a'/>
        <target dev='hda' bus='ide'/></disk>
        <disk type='file'><source file='/b'/><target dev='vda' bus='virtio'/></disk>
        <disk type='file'><source file='/c'/><target dev='sda' bus='sata'/></disk>
        <interface type='network'><source network='default'/><model type='e1000'/></interface>
        <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
        <sound model='ich6'/><redirdev bus='usb' type='spicevmc'/><redirdev bus='usb' type='spicevmc'/>"""
    )
    assert [(str(disk.path), name.target) for disk, name in zip(spec.config.disks, spec.disks, strict=True)] == [
        ("/b", "vda"), ("/a", "vdb"), ("/c", "vdc"),
    ]  # fmt: skip
    told = " ".join(spec.notes)
    for name in ("graphics spice", "video qxl", "tablet", "hda", "sda", "e1000", "spicevmc", "ich6"):
        assert name in told, name
    assert "graphics" not in domain_xml(spec, "/vmm")  # what it says is what there is


@pytest.mark.parametrize(
    "devices",
    [
        DISPLAY.replace("port='-1' tlsPort='-1' autoport='yes'", "port='5901'"),
        DISPLAY.replace("port='-1'", "port='-1' listen='0.0.0.0'"),
        DISPLAY.replace("port='-1'", "port='-1' passwd='x'"),
        DISPLAY.replace("<image compression='off'/>", "<listen type='address' address='192.0.2.1'/>"),
        DISPLAY.replace("spice", "sdl"),
        DISPLAY.replace("tablet", "passthrough"),
    ],
)
def test_a_display_that_somebody_wants_is_refused(devices: str) -> None:
    with pytest.raises(LibvirtError, match="no display"):
        shell(devices=devices)


@pytest.mark.parametrize(
    ("devices", "named"),
    [
        ("<graphics type='spice'/>", "graphics"),
        ("<graphics type='vnc' port='-1' autoport='yes'/>", "graphics"),
        ("<hostdev mode='subsystem'/>", "hostdev"),
        ("<tpm model='tpm-tis'/>", "tpm"),
        ("<sound model='ich9'/>", "sound"),
        ("<disk type='file' device='cdrom'><source file='/i'/><target dev='vda' bus='virtio'/></disk>", "cdrom"),
        ("<disk type='file'><source file='/i'/><target dev='hda' bus='ide'/></disk>", "ide"),
        ("<disk type='network'><target dev='vda'/></disk>", "network"),
        ("<disk><source file='/i'/><target dev='vda'/><iotune><group_name>g</group_name></iotune></disk>", "iotune"),
        ("<disk><driver cache='unsafe'/><source file='/i'/><target dev='vda'/></disk>", "unsafe"),
        ("<interface type='user'><model type='e1000'/></interface>", "e1000"),
        ("<interface type='user'><bandwidth><inbound floor='1'/></bandwidth></interface>", "floor"),
        (
            "<interface type='user'><bandwidth><outbound average='9' peak='10'/></bandwidth></interface>",
            "peak>: what a",
        ),
        ("<disk><driver discard='ignore'/><source file='/i'/><target dev='vda'/></disk>", "discard is 'unmap'"),
        ("<disk><driver detect_zeroes='unmap'/><source file='/i'/><target dev='vda'/></disk>", "detect_zeroes"),
        ("<interface type='bridge'><source bridge='a/b'/></interface>", "a/b"),
        ("<serial type='pty'><target port='1'/></serial>", "port 1"),
        ("<rng model='virtio'><rate bytes='1'/><backend model='random'/></rng>", "rate"),
        ("<controller type='scsi'/>", "scsi"),
        ("<emulator surprise='1'>/x</emulator>", "surprise"),
    ],
)
def test_devices_that_are_not_there_are_refused_by_name(devices: str, named: str) -> None:
    with pytest.raises(LibvirtError, match=named):
        shell(devices=devices)


@pytest.mark.parametrize(
    ("where", "xml", "named"),
    [
        ("life", "<currentMemory unit='MiB'>32</currentMemory>", "currentMemory"),
        ("life", "<vcpu current='3'>2</vcpu>", "current"),
        ("life", "<cputune><shares>1</shares></cputune>", "cputune"),
        ("life", "<on_crash>preserve</on_crash>", "preserve"),
        ("life", "<vcpu>0</vcpu>", "vcpu"),
        ("life", "<vcpu>100000</vcpu>", "cpus"),
        ("system", "<loader type='pflash'>/x</loader>", "loader"),
        ("top", "<features><hyperv/></features>", "hyperv"),
        ("top", "<clock offset='localtime'/>", "localtime"),
        ("top", "<cpu mode='custom'><feature name='vmx'/></cpu>", "feature"),
        ("top", "<qemu:commandline xmlns:qemu='x'><qemu:arg value='-s'/></qemu:commandline>", "qemu:commandline"),
        ("top", "<pm><suspend-to-mem enabled='yes'/></pm>", "yes"),
    ],
)
def test_what_else_is_not_there_is_refused_by_name(where: str, xml: str, named: str) -> None:
    with pytest.raises(VmmError, match=named):
        shell(**{where: xml})


def test_without_a_kernel_the_cure_is_told() -> None:
    with pytest.raises(LibvirtError, match="no firmware.*<kernel>"):
        read(
            "<domain type='qemu'><name>t</name><memory>65536</memory><os><type>hvm</type><boot dev='hd'/></os></domain>"
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<domain",
        "<network/>",
        "<!DOCTYPE x [<!ENTITY a 'b'>]><domain type='qemu'><name>&a;</name></domain>",
        "<!DOCTYPE x SYSTEM 'file:///etc/passwd'><domain/>",
        "<domain type='qemu'>" + "<a>" * 100 + "</a>" * 100 + "</domain>",
        "<domain type='qemu'>" + "<a/>" * 30_000 + "</domain>",
        "<domain type='qemu'><name>" + "a" * (2 << 20) + "</name></domain>",
        "<domain type='qemu'><name>../../x</name><memory>65536</memory>"
        "<os><type>hvm</type><kernel>/k</kernel></os></domain>",
    ],
)
def test_hostile_documents_are_refused(text: str) -> None:
    with pytest.raises(VmmError):
        read(text)


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_a_domain_or_an_error_of_ours(text: str) -> None:
    with pytest.raises(VmmError):
        read(f"<domain type='qemu'>{text}</domain>")


@settings(deadline=None)
@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs"))))
def test_title_and_description_come_back(text: str) -> None:
    spec = set_metadata(set_metadata(shell(), 0, text, None, None), 1, text, None, None)
    again = read(domain_xml(spec, "/vmm"))
    assert (again.title, again.description) == (text.strip(), text)


def test_metadata_by_namespace() -> None:
    spec = set_metadata(shell(), 2, "<app a='1'><inner>x</inner></app>", "my", "urn:my")
    spec = set_metadata(spec, 2, "<other/>", "o", "urn:other")
    assert "<my:app xmlns:my='urn:my' a='1'>" in domain_xml(spec, "/vmm")
    again = read(domain_xml(spec, "/vmm"))
    assert get_metadata(again, 2, "urn:my") == "<app a='1'>\n  <inner>x</inner>\n</app>\n"
    removed = set_metadata(again, 2, None, None, "urn:my")
    assert get_metadata(removed, 2, "urn:my") == "" and get_metadata(removed, 2, "urn:other") == "<other/>\n"


def test_disks_are_named_as_the_guest_names_them() -> None:
    assert [disk_name(index) for index in (0, 1, 25, 26, 27, 701)] == ["vda", "vdb", "vdz", "vdaa", "vdab", "vdzz"]
