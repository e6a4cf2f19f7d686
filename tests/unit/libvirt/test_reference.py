"""The documentation's tables of procedures are what the daemon has."""

from pathlib import Path

from vmm.libvirt import rpc
from vmm.libvirt.daemon import PROGRAMS
from vmm.libvirt.names import NAMES, api_name
from vmm.libvirt.reference import renewed

PAGE = Path(__file__).resolve().parents[3] / "docs" / "management.md"


def test_the_tables_are_current() -> None:
    text = PAGE.read_text()
    assert text == renewed(text), "write them anew: python -m vmm.libvirt.reference docs/management.md"


def test_procedures_have_libvirts_names() -> None:
    for number, procedure in PROGRAMS[rpc.REMOTE].items():
        assert procedure.name == NAMES[number]
    assert api_name(14) == "virDomainGetXMLDesc"
