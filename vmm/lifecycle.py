"""The life of a machine as a table of states, and how it ended. Pure: no clock, no loop, no core."""

from __future__ import annotations

import enum

from cpu.values import dataclass
from vmm.errors import StateError


class State(enum.StrEnum):
    """Where a machine is in its life."""

    CREATED = "created"
    """Configured; nothing is built."""
    PAUSED = "paused"
    """Built; every vCPU is parked."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Running; the guest was asked to power off."""
    STOPPED = "stopped"
    """Ended; the outcome is known."""


class Change(enum.StrEnum):
    """What moves it on."""

    BUILD = "build"
    RESUME = "resume"
    PAUSE = "pause"
    ASK = "stop"
    END = "end"


TABLE: dict[tuple[State, Change], State] = {
    (State.CREATED, Change.BUILD): State.PAUSED,
    (State.CREATED, Change.END): State.STOPPED,
    (State.PAUSED, Change.RESUME): State.RUNNING,
    (State.PAUSED, Change.END): State.STOPPED,
    (State.RUNNING, Change.PAUSE): State.PAUSED,
    (State.RUNNING, Change.ASK): State.STOPPING,
    (State.RUNNING, Change.END): State.STOPPED,
    (State.STOPPING, Change.ASK): State.STOPPING,
    (State.STOPPING, Change.END): State.STOPPED,
}


class Lifecycle:
    """Holds the state; a change that the table lacks raises StateError and changes nothing."""

    def __init__(self) -> None:
        self.state = State.CREATED

    def change(self, change: Change) -> State:
        """Go to the state that the table names, and return it. Raises StateError."""
        after = TABLE.get((self.state, change))
        if after is None:
            allowed = ", ".join(kind.value for (state, kind) in TABLE if state is self.state) or "nothing"
            raise StateError(f"cannot {change.value} a machine that is {self.state.value}; possible: {allowed}")
        self.state = after
        return after


class Reason(enum.StrEnum):
    """Why a machine ended."""

    SHUTDOWN = "shutdown"
    """The guest powered itself off."""
    MIGRATED = "migrated"
    """The machine runs on elsewhere."""
    RESET = "reset"
    """The guest rebooted and no restart was asked for."""
    EXIT = "exit"
    """The guest wrote to the exit port."""
    HALTED = "halted"
    """Every vCPU halted with interrupts off: nothing can wake the guest."""
    CRASH = "crash"
    """The guest reported a panic."""
    TRIPLE_FAULT = "triple-fault"
    GUEST_ERROR = "guest-error"
    """The guest did what the machine cannot answer."""
    HOST_ERROR = "host-error"
    """The host, the core or the VMM failed."""
    TIMEOUT = "timeout"
    KILLED = "killed"
    SIGNAL = "signal"
    """A signal ended the process that runs it; `code` is its number."""


EXIT_STATUS = {
    Reason.SHUTDOWN: 0,
    Reason.MIGRATED: 0,
    Reason.RESET: 0,
    Reason.HALTED: 0,
    Reason.CRASH: 3,
    Reason.TRIPLE_FAULT: 3,
    Reason.GUEST_ERROR: 3,
    Reason.HOST_ERROR: 4,
    Reason.TIMEOUT: 124,
    Reason.KILLED: 137,
}
"""Exit status of `vmm run`; 137 is what a shell reports for SIGKILL.
EXIT and SIGNAL carry their own; 2 is for ConfigError."""
EXIT_CONFIG = 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine ended: `detail` is one line for people, `code` the value that the guest wrote to the exit port,
    `instruction` the bytes at `rip` that a core could not execute."""

    reason: Reason
    detail: str = ""
    code: int | None = None
    rip: int = 0
    instruction: bytes = b""

    @property
    def status(self) -> int:
        """The exit status of `vmm run`; a guest that writes v to port 0xf4 ends with (v << 1) | 1, in eight bits."""
        if self.reason is Reason.EXIT:
            return ((self.code or 0) << 1 | 1) & 0xFF
        if self.reason is Reason.SIGNAL:
            return 128 + (self.code or 0)
        return EXIT_STATUS[self.reason]

    @property
    def ok(self) -> bool:
        """The exit status is 0."""
        return self.status == 0

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value
