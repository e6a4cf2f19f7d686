"""The typer application: every command with its help and shell completion. Commands import what they need when they
run, so that completion and `--help` stay quick."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import RUN_OPTIONS, RunArguments, RunOption

SUB_APPS = ("images", "disk", "block", "tls", "bench")
"""Modules cli.NAME with a typer application `app`."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def complete_machine(incomplete: str) -> list[str]:
    """Shell completion of the names of running machines."""
    from vmm.errors import VmmError
    from vmm.management.registry import entries

    try:
        return [entry.name for entry in entries() if entry.name.startswith(incomplete)]
    except VmmError:
        return []


def complete_image(incomplete: str) -> list[str]:
    """Shell completion of image names."""
    from images.catalog import names

    return [name for name, _, _ in names() if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="A running machine.", autocompletion=complete_machine)]


def _annotation(option: RunOption) -> tuple[Any, Any]:
    """(type with typer's option, default)"""
    if option.kind == "switch":
        flags = f"{option.flag}/{option.opposite}" if option.opposite else option.flag
        return Annotated[bool | None, typer.Option(flags, help=option.help)], None
    names = (option.flag, option.short) if option.short else (option.flag,)
    settings = typer.Option(*names, help=option.help, metavar=option.metavar)
    if option.kind == "list":
        return Annotated[list[str] | None, settings], None
    return Annotated[str | None, settings], None


def _run_command() -> Any:
    """The function behind `vmm run`, its parameters made from RUN_OPTIONS."""

    def run(**values: Any) -> None:
        from cli.run import execute

        words: list[str] = values.pop("words") or []
        parsed = RunArguments(image=words[0] if words else None, command=words[1:])
        for option in RUN_OPTIONS:
            value = values.pop(option.field)
            for item in value if isinstance(value, list) else [value]:
                if item is not None:
                    parsed.set(option, item)
        sys.exit(execute(parsed))

    image = Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE] [-- COMMAND…]", help="An image or a kernel file.", autocompletion=complete_image
        ),
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("words", keyword, default=None, annotation=image)]
    for option in RUN_OPTIONS:
        annotation, default = _annotation(option)
        parameters.append(inspect.Parameter(option.field, keyword, default=default, annotation=annotation))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = """Run a machine until it ends; its exit status tells how.

    0: the guest shut down or rebooted. 2: usage or configuration. 3: the guest crashed. 4: the host failed. 124:
    --timeout. 137: killed. A guest that writes v to port 0xf4 ends with (v << 1) | 1. On a terminal Ctrl-] ends the
    machine.
    """
    return run


def console(
    name: Annotated[str, typer.Argument(metavar="NAME|SOCKET", help="A machine.", autocompletion=complete_machine)],
    follow: Annotated[bool, typer.Option("--follow", help="Watch on after piped input has ended.")] = False,
    linger: Annotated[
        float, typer.Option(help="Seconds of silence after the end of piped input, before it detaches.")
    ] = 2.0,
) -> None:
    """Attach this terminal to a machine's console. Ctrl-] detaches; several may watch.

    `echo COMMAND | vmm console NAME` types the command, shows what follows and detaches when nothing more comes. With
    input that ends without a byte (/dev/null) it watches until the machine ends.
    """
    from cli.machines import attach_console

    attach_console(name, follow=follow, linger=linger)


def exec_(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="NAME [--] COMMAND…", autocompletion=complete_machine)
    ] = None,
    interactive: Annotated[bool, typer.Option("-i", "--interactive", help="It reads our standard input.")] = False,
    tty: Annotated[bool, typer.Option("-t", "--tty", help="It runs on a terminal of its own.")] = False,
    env: Annotated[list[str] | None, typer.Option("-e", "--env", metavar="NAME[=VALUE]", help="A variable.")] = None,
    workdir: Annotated[str, typer.Option("-w", "--workdir", metavar="DIR", help="Where it runs.")] = "",
    user: Annotated[str, typer.Option("-u", "--user", metavar="USER[:GROUP]", help="As whom; default root.")] = "",
) -> None:
    """Run a command in a machine that runs; its exit status is the command's.

    126: the command cannot be run, 127: it is not found, 128 + n: signal n ended it. What is behind COMMAND is its own.
    """
    # cli.main reads the command line itself (cli.guestaccess.parse_exec); this is for its help and for completion.


def cp(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="NAME:PATH, a path of this host, or - (tar).")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The other of the two.")],
    follow: Annotated[bool, typer.Option("-L", "--follow-link", help="Follow a link that SOURCE is.")] = False,
) -> None:
    """Copy files and directories into a machine that runs, or out of it.

    Into a directory that is there they go under their own name; NAME:DIR/. means what is in it. With - a tar stream is
    read from standard input, or written to standard output.
    """
    from cli.guestaccess import copy

    copy(source, target, follow=follow)


def ps(
    json: Json = False,
    stats: Annotated[bool, typer.Option("--stats", help="Counters of exits by reason.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Prometheus text.")] = False,
) -> None:
    """List the machines that you run."""
    from cli.machines import list_machines

    list_machines(json=json, stats=stats, metrics=metrics)


def stop(
    name: Name,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the guest before it is killed.")] = 30.0,
    json: Json = False,
) -> None:
    """Press the power button; kill the machine if it does not power off in time."""
    from cli.machines import stop_machine

    stop_machine(name, timeout, json=json)


def kill(name: Name, json: Json = False) -> None:
    """End a machine at once."""
    from cli.machines import kill_machine

    kill_machine(name, json=json)


def pause(name: Name, json: Json = False) -> None:
    """Park every vCPU of a machine."""
    from cli.machines import change_machine

    change_machine(name, "pause", json=json)


def resume(name: Name, json: Json = False) -> None:
    """Let a paused machine run on."""
    from cli.machines import change_machine

    change_machine(name, "resume", json=json)


def set_(
    name: Name,
    cpus: Annotated[
        int | None, typer.Option(metavar="N", help="Processors, up to what --cpus N,max=M allowed.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What the guest keeps of its memory; needs a balloon.")
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(metavar="ID,LIMIT=N…", help="A disk's limits, as vda,iops=500,bps=20M; 0 takes one away."),
    ] = None,
    net: Annotated[
        list[str] | None,
        typer.Option(metavar="ID,LIMIT=N…", help="A card's limits and policy, as net0,bps-in=1M,allow=10.0.0.0/8."),
    ] = None,
    json: Json = False,
) -> None:
    """Change a machine while it runs."""
    from cli.setting import set_machine

    set_machine(name, cpus=cpus, memory=memory, disks=disk or [], nets=net or [], json=json)


def attach(
    name: Name,
    disk: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="A disk, as of vmm run.")] = None,
    net: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="A network card, as of vmm run.")] = None,
    share: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="A directory, HOST[:/GUEST][,ro], as of vmm run.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the guest's driver.")] = 10.0,
    json: Json = False,
) -> None:
    """Add disks, network cards and shared directories to a machine that runs."""
    from cli.hotplug import attach_device

    attach_device(name, disk or [], net or [], share or [], timeout, json=json)


def detach(
    name: Name,
    device: Annotated[str, typer.Argument(metavar="ID", help="A disk, card or share, as vmm ps --json names it.")],
    force: Annotated[bool, typer.Option("--force", help="Pull it if the guest does not give it up.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that the guest has; by default 30, with --force 5.")
    ] = None,
    json: Json = False,
) -> None:
    """Take a disk, network card or share from a machine that runs: the guest is asked, and gives it up."""
    from cli.hotplug import detach_device

    detach_device(name, device, timeout, force=force, json=json)


def snapshot(
    name: Name,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where it goes; replaced if it is a snapshot.")],
    base: Annotated[Path | None, typer.Option(help="Keep only what differs from this snapshot.")] = None,
    compress: Annotated[str | None, typer.Option(metavar="zstd", help="Smaller, but slower to restore.")] = None,
    disks: Annotated[str, typer.Option(metavar="copy|reference", help="What becomes of writable disks.")] = "copy",
    stop: Annotated[bool, typer.Option("--stop", help="End the machine when it is saved.")] = False,
    json: Json = False,
) -> None:
    """Save a running machine into a directory. It runs on, and stands still for milliseconds only."""
    from cli.snapshots import save_machine

    save_machine(name, directory, base=base, compress=compress, disks=disks, stop=stop, json=json)


def restore(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A snapshot.")],
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND…]", help="Run in the guest.")] = None,
    name: Annotated[str | None, typer.Option(help="Name for vmm ps, console, stop …")] = None,
    core: Annotated[str | None, typer.Option(metavar="auto|kvm|soft", help="Execution core.")] = None,
    console: Annotated[str | None, typer.Option(metavar="SPEC", help="stdio, none or socket=PATH.")] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Run it when vmm resume says so.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Open the files that a foreign snapshot names.")] = False,
    as_copy: Annotated[
        bool, typer.Option("--as-copy", help="Give it addresses, a host name and a machine id of its own.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a machine on from a snapshot, in the foreground, as often as wanted: each is a copy of its own."""
    from cli.snapshots import restore_machine

    sys.exit(
        restore_machine(
            directory,
            command or [],
            name=name,
            core=core,
            console=console,
            paused=paused,
            trust=trust,
            as_copy=as_copy,
            json=json,
        )
    )


def fork(
    name: Name,
    count: Annotated[int, typer.Option(metavar="N", help="How many copies.")] = 1,
    as_: Annotated[str | None, typer.Option("--as", metavar="NAME-%d", help="Their names.")] = None,
) -> None:
    """Start copies of a running machine, which runs on: processes of their own that share memory until they write."""
    from cli.snapshots import fork_machine

    fork_machine(name, count, as_)


def snapshot_info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A snapshot.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte.")] = False,
    json: Json = False,
) -> None:
    """Say what a snapshot is, and whether it is whole."""
    from cli.snapshots import show_info

    show_info(directory, verify=verify, json=json)


def gdb(
    name: Name,
    address: Annotated[
        str | None, typer.Argument(metavar="[ADDRESS]", help="Where it listens for GDB: [HOST:]PORT or unix:PATH.")
    ] = None,
    symbols: Annotated[Path | None, typer.Option(help="The kernel's: vmlinux, System.map or kallsyms.")] = None,
    execute: Annotated[
        Path | None, typer.Option("-x", "--execute", metavar="FILE", help="Run GDB's commands in it, then leave.")
    ] = None,
    stdio: Annotated[bool, typer.Option("--stdio", help="Speak to GDB by standard input and output.")] = False,
    close: Annotated[bool, typer.Option("--close", help="Listen no more at addresses given before.")] = False,
    arch: Annotated[str, typer.Option(metavar="x86-64|i386|i8086", help="As GDB is to see it.")] = "x86-64",
) -> None:
    """Debug a running machine with GDB, with its kernel's symbols. It runs on when GDB ends or detaches.

    With ADDRESS it lets GDB connect there (`target remote ADDRESS`), until the machine ends, and starts none.
    """
    from cli.debugging import debug_machine

    sys.exit(
        debug_machine(name, address, symbols=symbols, execute=execute, stdio=stdio, close=close, architecture=arch)
    )


Cpu = Annotated[int | None, typer.Option("--cpu", metavar="N", help="Only this vCPU.")]


def registers(name: Name, cpu: Cpu = None, json: Json = False) -> None:
    """Show what a machine's vCPUs hold: general, segment, control and debug registers, MSRs, interrupts that wait."""
    from cli.debugging import show_registers

    show_registers(name, cpu=cpu, json=json)


def trace(
    name: Name,
    cpu: Cpu = None,
    for_: Annotated[
        float, typer.Option("--for", metavar="SECONDS", help="Also record what it executes for this long.")
    ] = 0.0,
    symbols: Annotated[Path | None, typer.Option(help="The kernel's: vmlinux, System.map or kallsyms.")] = None,
    json: Json = False,
) -> None:
    """Show what a machine's vCPUs did last: accesses to devices, counters and, with --for, blocks of code.

    A core that keeps no trace of code (KVM) is looked at 50 times a second instead.
    """
    from cli.debugging import show_trace

    show_trace(name, cpu=cpu, seconds=for_, symbols=symbols, json=json)


def symbols(
    source: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="System.map, a copy of /proc/kallsyms, or a machine.")
    ],
    of: Annotated[str | None, typer.Option("--of", metavar="NAME", help="Where this machine's kernel runs.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="In place of stdout.")] = None,
) -> None:
    """Make a symbol file for GDB, from a file or from the kernel of a machine whose guest has the agent."""
    from cli.debugging import make_symbols

    make_symbols(source, machine=of, output=output)


def migrate(
    name: Name,
    uri: Annotated[
        str | None, typer.Argument(metavar="[URI]", help="Where vmm receive waits: tcp:HOST:PORT or unix:PATH.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes a second at most, as 100M, until it stands still.")
    ] = None,
    downtime: Annotated[float | None, typer.Option(metavar="MS", help="How long it may stand still; 300.")] = None,
    connections: Annotated[
        int | None, typer.Option(metavar="N", help="Connections beside each other, 1 to 16.")
    ] = None,
    compress: Annotated[bool, typer.Option("--compress", help="Compress what is sent (zstd).")] = False,
    throttle: Annotated[
        int | None, typer.Option(metavar="PERCENT", help="Of its time that a guest may be kept waiting; 90. 0: never.")
    ] = None,
    copy_storage: Annotated[
        bool, typer.Option("--copy-storage", help="Copy its disks along, which the hosts do not share.")
    ] = False,
    drop_connections: Annotated[
        bool, typer.Option("--drop-connections", help="The guest's connections through passt may end.")
    ] = False,
    postcopy: Annotated[
        bool, typer.Option("--postcopy", help="Once rounds no longer pay it goes, and its memory follows.")
    ] = False,
    postcopy_now: Annotated[
        bool, typer.Option("--postcopy-now", help="Likewise, at once; also of a migration begun with --postcopy.")
    ] = False,
    recover: Annotated[
        bool, typer.Option("--recover", help="The connection broke in post-copy: go on over a new one, to URI.")
    ] = False,
    tls: Annotated[Path | None, typer.Option(metavar="DIR", help="A client's certificate (vmm tls client).")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="End a migration that is under way.")] = False,
    json: Json = False,
) -> None:
    """Move a running machine to another host while it runs. Whatever fails, it runs on here.

    Without URI, --bandwidth and --downtime change a migration that is under way. Ctrl-C cancels it.
    """
    from cli.migrate import migrate_machine

    migrate_machine(
        name,
        uri,
        cancel=cancel,
        bandwidth=bandwidth,
        downtime=downtime,
        tls=tls,
        json=json,
        recover=recover,
        postcopy="now" if postcopy_now else "auto" if postcopy else None,
        connections=connections,
        compress=compress,
        throttle=throttle,
        copy_storage=copy_storage,
        drop_connections=drop_connections,
    )


def receive(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Where to wait: tcp:HOST:PORT, unix:PATH or fd:NUMBER.")],
    name: Annotated[str | None, typer.Option(help="What the machine is called here; by default as there.")] = None,
    tls: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A server's certificate (vmm tls init): its clients come.")
    ] = None,
    core: Annotated[str | None, typer.Option(metavar="auto|kvm|soft", help="Execution core.")] = None,
    console: Annotated[str | None, typer.Option(metavar="SPEC", help="stdio, none or socket=PATH.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Open the files that an unknown source names.")] = False,
    disk: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="The file of a disk here; may be repeated.")
    ] = None,
    recover: Annotated[
        str | None, typer.Option(metavar="NAME", help="Have this machine wait at URI for its source, which was lost.")
    ] = None,
    json: Json = False,
) -> None:
    """Wait for a machine that vmm migrate sends, and run it in the foreground."""
    from cli.migrate import receive_again, receive_machine

    if recover is not None:
        receive_again(recover, uri, tls=tls)
        return

    sys.exit(
        receive_machine(
            uri, name=name, tls=tls, core=core, console=console, trust=trust, disks=disk or [], json=json
        )
    )


def doctor(json: Json = False) -> None:
    """Say which execution core would run here and why, and what would make it better."""
    from cli.doctor import report

    sys.exit(report(json=json))


def daemon(
    socket: Annotated[
        Path | None, typer.Option(help="Where clients connect; by default libvirt-sock in the runtime directory.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Where definitions are kept.")] = None,
    group: Annotated[str | None, typer.Option(help="A group whose members may connect as well.")] = None,
    listen_tls: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Also for clients with certificates; the port is 16514.")
    ] = None,
    tls: Annotated[Path | None, typer.Option(metavar="DIR", help="Certificates, as vmm tls init makes them.")] = None,
) -> None:
    """Serve virsh and whatever else speaks libvirt's protocol. Each machine is a process of its own, which stays."""
    from cli.daemon import run_daemon

    run_daemon(socket=socket, state=state, group=group, listen_tls=listen_tls, tls=tls)


def serve(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where clients connect.")] = "127.0.0.1:3000",
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who may: a token a line; needed off loopback.")
    ] = None,
    state: Annotated[Path | None, typer.Option(metavar="DIR", help="Where paused sandboxes are kept.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(metavar="NAME=IMAGE", help="What a template means, as base=oci:python:3.12.")
    ] = None,
    only_templates: Annotated[
        bool, typer.Option("--only-templates", help="No images but those of --template; nothing else is pulled.")
    ] = False,
    domain: Annotated[str, typer.Option(help="Behind PORT-ID. the name of a sandbox's port.")] = "",
    internet: Annotated[bool, typer.Option("--internet", help="Sandboxes that ask for the internet have it.")] = False,
    memory: Annotated[str, typer.Option(help="Memory of each sandbox, as 1G; by default the image's.")] = "",
    core: Annotated[str, typer.Option(help="auto, kvm or soft.")] = "",
    drain: Annotated[float, typer.Option(metavar="SECONDS", help="For requests under way, on SIGTERM.")] = 30.0,
) -> None:
    """Serve sandboxes over HTTP to clients of E2B's API: each is a machine of its own, in this process."""
    from cli.serve import run_serve

    run_serve(
        listen=listen, token_file=token_file, state=state, templates=template or [],
        only_templates=only_templates, domain=domain, internet=internet,
        memory=memory, core=core, drain=drain,
    )  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        from vmm import __version__

        sys.stdout.write(f"vmm (loopvisor) {__version__}\n")
        raise typer.Exit


def vmm(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run and manage virtual machines."""


def build() -> typer.Typer:
    """The whole application."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(vmm)
    app.command("run", context_settings={"allow_interspersed_args": True})(_run_command())
    app.command("exec")(exec_)
    app.command("set")(set_)
    for command in (
        cp, console, ps, stop, kill, pause, resume, attach, detach, snapshot, restore, fork, snapshot_info, gdb,
        registers, trace, symbols, migrate, receive, doctor, daemon, serve,
    ):  # fmt: skip
        app.command()(command)
    for name in SUB_APPS:
        try:
            module = importlib.import_module(f"cli.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"cli.{name}":
                raise
            continue
        app.add_typer(module.app, name=name)
    return app
