"""What clients hear of a domain's migration: its job's numbers while it goes on, what it took, and events. The machine
tells its daemon five times a second how far it is (vmm.events.Migrating). Loop thread.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vmm.config import PAGE
from vmm.libvirt.events import DomainEvent
from vmm.libvirt.wire import Param, boolean_param, int_param, ullong_param

if TYPE_CHECKING:
    from vmm.libvirt.domain import Domain
    from vmm.libvirt.events import Hub

JOB_NONE, JOB_UNBOUNDED, JOB_COMPLETED = 0, 2, 3
"""virDomainJobType."""
MIGRATION_OUT = 5
"""virDomainJobOperation."""


def begin(domain: Domain) -> dict[str, Any]:
    """A migration begins; what is known of it, which the caller gives "over" at its end."""
    job: dict[str, Any] = {"begun": time.monotonic()}
    domain.extra["migration"] = job
    return job


def job_of(domain: Domain) -> dict[str, Any] | None:
    """What the machine told last of its migration; None: it does not move."""
    job = domain.extra.get("migration")
    return job if job is not None and not job.get("over") else None


def completed(domain: Domain, *, keep: bool) -> dict[str, Any] | None:
    """What the migration took by which the machine left, until it is started here again; told once, unless `keep`."""
    job = domain.extra.get("migration")
    if job is None or job.get("phase") != "done" or not job.get("over") or job.get("told"):
        return None
    job["told"] = not keep
    found: dict[str, Any] = job
    return found


def told(events: Hub, domain: Domain, event: dict[str, Any]) -> None:
    """The machine told of its migration."""
    job = domain.extra.get("migration")
    if job is None:  # somebody moves it without this daemon
        return
    before = job.get("iteration", 0)
    job.update(event)
    match job.get("phase"):
        case "memory":
            job["iteration"] = int(job.get("rounds", 0)) + 1
            if job["iteration"] > before:
                events.domain(DomainEvent.MIGRATION_ITERATION, domain.ref, job["iteration"])
        case "done" if "ended" not in job:
            job["ended"] = time.monotonic()
            events.domain(DomainEvent.JOB_COMPLETED, domain.ref, job_params(job))


def _elapsed(job: dict[str, Any]) -> int:
    return int((job.get("ended", time.monotonic()) - job["begun"]) * 1000)


def job_numbers(job: dict[str, Any]) -> tuple[int, ...]:
    """As virDomainJobInfo has them: type, times in ms, bytes of everything, memory and files."""
    sent, left = int(job.get("sent", 0)), int(job.get("remaining", 0))
    return (JOB_UNBOUNDED, _elapsed(job), 0, sent + left, sent, left, sent + left, sent, left, 0, 0, 0)


def job_params(job: dict[str, Any]) -> list[Param]:
    """The same by name, with rates."""
    sent, left = int(job.get("sent", 0)), int(job.get("remaining", 0))
    stood = int(job.get("downtime_ms", 0)) or int(job.get("expected_downtime_ms", 0))
    values = {
        "time_elapsed": _elapsed(job),
        "data_total": sent + left, "data_processed": sent, "data_remaining": left,
        "memory_total": sent + left, "memory_processed": sent, "memory_remaining": left,
        "memory_bps": int(job.get("rate", 0)), "memory_dirty_rate": int(job.get("dirty_rate", 0)) // PAGE,
        "memory_page_size": PAGE, "memory_iteration": int(job.get("rounds", 0)) + ("ended" not in job),
        "downtime": stood,
    }  # fmt: skip
    params = [int_param("operation", MIGRATION_OUT), *(ullong_param(name, value) for name, value in values.items())]
    if "ended" in job:
        params.append(boolean_param("success", True))
    return params
