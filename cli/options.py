"""The options of `vmm run`, declared once: the quick parser below and the typer command are both made from this table.

`vmm run` must reach the guest's first byte quickly, and loading typer takes longer than starting a machine. So a plain,
correct command line is read here; for anything else (`--help`, a mistake) typer takes over and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal


class RunOption:
    """`field` is the key in vmm.Config, or a switch of the command itself (`of` "command"); `short` is another flag. A
    switch of the configuration has its opposite, `--no-…`, for what a file or an image has set."""

    __slots__ = ("field", "flag", "help", "kind", "metavar", "of", "short")

    def __init__(
        self,
        flag: str,
        field: str,
        kind: Literal["text", "switch", "list"],
        help: str,
        metavar: str = "",
        of: Literal["config", "command"] = "config",
        short: str = "",
    ) -> None:
        self.flag, self.field, self.kind, self.help, self.metavar, self.of = flag, field, kind, help, metavar, of
        self.short = short

    @property
    def opposite(self) -> str:
        """The flag that switches it off, or ""."""
        return f"--no-{self.flag[2:]}" if self.kind == "switch" and self.of == "config" else ""


RUN_OPTIONS = (
    RunOption("--core", "core", "text", "Execution core; auto takes the best that this host has.", "auto|kvm|soft"),
    RunOption(
        "--cpu-model", "cpu_model", "text", "What guests are told of the processor.", "v2|v3|max|host", short="--cpu"
    ),
    RunOption("--cpus", "cpus", "text", "Virtual CPUs, and how many there may be while it runs.", "N[,max=M]"),
    RunOption("--max-cpus", "max_cpus", "text", "As max= of --cpus.", "M"),
    RunOption("--memory", "memory", "text", "Guest memory.", "SIZE"),
    RunOption("--kernel", "kernel", "text", "bzImage, vmlinux, PVH or multiboot ELF.", "FILE"),
    RunOption("--initrd", "initrd", "text", "Initial RAM disk.", "FILE"),
    RunOption("--cmdline", "cmdline", "text", "Kernel command line in place of the default.", "TEXT"),
    RunOption("--append", "append", "text", "Added to the kernel command line.", "TEXT"),
    RunOption("--flat", "flat", "text", "Raw code: FILE[,load=ADDRESS][,entry=ADDRESS][,mode=real|…].", "SPEC"),
    RunOption("--disk", "disks", "list", "FILE[,ro][,snapshot][,id=NAME][,cache=…][,iops=N][,bps=SIZE][,…].", "SPEC"),
    RunOption("--net", "nets", "list", "none, user, tap=NAME, unix=PATH[,optional][,mac=…][,pcap=…][,…].", "SPEC"),
    RunOption("--share", "shares", "list", "HOST[:/GUEST][,ro][,uid=N][,cache=…][,id=TAG], a directory.", "SPEC"),
    RunOption("--root", "root", "text", "DIR[,ro]: a directory of the host as the root file system.", "SPEC"),
    RunOption("--console", "console", "text", "stdio, none or socket=PATH, then [,log=FILE][,log_limit=SIZE].", "SPEC"),
    RunOption("--hvc", "hvc", "switch", "Add a virtio console (hvc0)."),
    RunOption("--port", "ports", "list", "NAME=PATH: a port of the virtio console as a UNIX socket.", "SPEC"),
    RunOption("--gdb", "gdb", "text", "For GDB: [HOST:]PORT or unix:PATH, then [,wait=off][,arch=i386].", "SPEC"),
    RunOption("--vsock", "vsock", "text", "Base path of the vsock sockets.", "PATH"),
    RunOption("--agent", "agent", "switch", "The guest runs the agent, which takes commands over vsock."),
    RunOption("--entrypoint", "entrypoint", "text", "The program, in place of the image's.", "WORDS"),
    RunOption("--command", "command", "text", "What follows the entrypoint if nothing is given behind --.", "WORDS"),
    RunOption("--env", "env", "list", "An environment variable for programs in the guest.", "NAME[=VALUE]"),
    RunOption("--user", "user", "text", "As whom programs in the guest run.", "USER[:GROUP]"),
    RunOption("--workdir", "workdir", "text", "Where programs in the guest start.", "DIR"),
    RunOption("--publish", "publish", "list", "HOST:GUEST: a TCP port of the host leads there.", "PORTS", "command"),
    RunOption("--pull", "pull", "text", "When registries are asked: missing, always or never.", "WHEN", "command"),
    RunOption("--rng", "rng", "switch", "A virtio entropy device; stock kernels have it by default."),
    RunOption("--balloon", "balloon", "switch", "A virtio balloon: memory that the guest does not use goes back."),
    RunOption("--transport", "transport", "text", "For console, entropy and vsock.", "pci|mmio"),
    RunOption("--packed", "packed", "switch", "Every virtio device offers packed rings."),
    RunOption("--name", "name", "text", "Name for vmm ps, console, stop …; by default made from the image.", "NAME"),
    RunOption("--uuid", "uuid", "text", "What the guest reads in SMBIOS; by default it belongs to the name.", "UUID"),
    RunOption("--timeout", "timeout", "text", "End the machine after this long; exit status 124.", "SECONDS"),
    RunOption("--clock", "clock", "text", "virtual: guest time follows instructions; runs repeat.", "real|virtual"),
    RunOption("--parallel", "parallel", "text", "A host thread for each vCPU of the software core.", "auto|on|off"),
    RunOption("--seed", "seed", "text", "Makes every random byte for the guest a function of it.", "N"),
    RunOption("--epoch", "epoch", "text", "The guest's wall clock at the start, seconds since 1970.", "SECONDS"),
    RunOption("--platform", "platform", "text", "bare: no ACPI, PCI, virtio; tiny guests start quicker.", "pc|bare"),
    RunOption("--reboot", "reboot", "switch", "Restart in place when the guest reboots."),
    RunOption("--fw-cfg", "fw_cfg", "list", "name=NAME,file=FILE or name=NAME,string=TEXT: an item in fw_cfg.", "SPEC"),
    RunOption("--slot", "slots", "list", "ID=NUMBER: the PCI device number of a device.", "SPEC"),
    RunOption("--testdev", "testdev", "switch", "The ports of QEMU's pc-testdev, for processor tests."),
    RunOption("--hugepages", "hugepages", "switch", "Guest memory from the host's reserved huge pages."),
    RunOption("--direct", "direct", "text", "Guest programs run natively, beside the software core.", "auto|on|off"),
    RunOption("--config", "config_file", "text", "TOML file; options win over it.", "FILE", "command"),
    RunOption("--paused", "paused", "switch", "Build the machine, run it when vmm resume says so.", of="command"),
    RunOption("--warm", "warm", "switch", "Go on from a machine of this kind that was booted before.", of="command"),
    RunOption("--json", "json", "switch", "Print the outcome as JSON on stderr.", of="command"),
    RunOption("--timing", "timing", "switch", "When the machine did what, on stderr.", of="command"),
    RunOption("--timing-svg", "timing_svg", "text", "The same as a picture.", "FILE", "command"),
    RunOption("--print-config", "print_config", "switch", "Print the configuration as TOML, do not run.", of="command"),
    RunOption("--print-schema", "print_schema", "switch", "Print the file's JSON Schema, for editors.", of="command"),
    RunOption("--print-cmdline", "print_cmdline", "switch", "Print the kernel command line.", of="command"),
)
_BY_FLAG = {flag: option for option in RUN_OPTIONS for flag in (option.flag, option.short) if flag}
_BY_OPPOSITE = {option.opposite: option for option in RUN_OPTIONS if option.opposite}


class RunArguments:
    """A parsed `vmm run`: `config` holds what was given, as text; `command` what follows `--`."""

    def __init__(self, image: str | None = None, command: Sequence[str] = ()) -> None:
        self.image = image
        self.command = list(command)
        self.config: dict[str, Any] = {}
        self.config_file: str | None = None
        self.publish: list[str] = []
        self.pull = "missing"
        self.paused = False
        self.warm = False
        self.json = False
        self.timing = False
        self.timing_svg: str | None = None
        self.print_config = False
        self.print_schema = False
        self.print_cmdline = False

    def set(self, option: RunOption, value: Any) -> None:
        if option.of == "command" and option.kind == "list":
            getattr(self, option.field).append(value)
        elif option.of == "command":
            setattr(self, option.field, value)
        elif option.field == "cpus" and ",max=" in value:
            self.config["cpus"], _, self.config["max_cpus"] = value.partition(",max=")
        elif option.kind == "list" and value == "none":
            self.config[option.field] = []  # also of what an image or a file brings
        elif option.kind == "list":
            self.config.setdefault(option.field, []).append(value)
        else:
            self.config[option.field] = value


def parse_run(arguments: Sequence[str]) -> RunArguments | None:
    """What follows `vmm run`. None: typer should look at it."""
    parsed = RunArguments()
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            parsed.command = list(rest)
        elif argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            option = _BY_FLAG.get(flag)
            if option is None and (option := _BY_OPPOSITE.get(argument)) is not None:
                parsed.set(option, False)
                continue
            if option is None or (option.kind == "switch" and equals):
                return None
            if option.kind == "switch":
                parsed.set(option, True)
                continue
            if not equals:
                following = next(rest, None)
                if following is None:
                    return None
                value = following
            parsed.set(option, value)
        elif parsed.image is None:
            parsed.image = argument
        else:
            return None
    return parsed
