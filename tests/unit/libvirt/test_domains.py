"""Domains that end while a client's call waits for something else."""

import uuid

import pytest

from vmm.libvirt.domain import Domain
from vmm.libvirt.errors import Code, LibvirtError


def test_a_transient_domain_that_has_ended_is_no_domain() -> None:
    domain = Domain("brief", uuid.uuid4())
    for look in (lambda: domain.spec, lambda: domain.xml("/usr/bin/vmm"), lambda: domain.xml("vmm", inactive=True)):
        with pytest.raises(LibvirtError, match="'brief'") as error:
            look()
        assert error.value.code == Code.NO_DOMAIN
