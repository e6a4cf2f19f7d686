"""`vmm disk`: create, look at, check, convert, resize, snapshot, commit and rebase disk images that no machine uses.

Exit statuses: 0; 2: what was asked for cannot be; 4: the host failed. `vmm disk check` besides: 1, the image is
inconsistent; 5, it is consistent and has lost clusters. After a repair that succeeded it is 0.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from cli.progress import ProgressLine
from cli.table import print_table

app = typer.Typer(help="Create, check, convert and change disk images that no machine uses.", no_args_is_help=True)

EXIT_CORRUPT, EXIT_LEAKS = 1, 5
SHOWN = 20
"""Problems that check prints."""
File = Annotated[str, typer.Argument(metavar="FILE", help="A disk image.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FormatOption = Annotated[
    str | None, typer.Option("--format", metavar="raw|qcow2", help="Of FILE; by default found by its content.")
]
BackingRule = Annotated[
    str, typer.Option("--allow-backing", metavar="dir|any|none", help="Which backing files images may name.")
]
DataOption = Annotated[str | None, typer.Option("--data", metavar="FILE", help="The image's external data file.")]
ClusterSize = Annotated[str, typer.Option("--cluster-size", metavar="SIZE", help="Of qcow2: 512 to 2M.")]
RefcountBits = Annotated[int, typer.Option("--refcount-bits", metavar="N", help="1, 2, 4 … 64.")]
Version = Annotated[int, typer.Option("--qcow2-version", metavar="2|3", help="2 is for programs older than 2012.")]
ExtendedL2 = Annotated[bool, typer.Option("--extended-l2", help="Clusters have 32 subclusters.")]
LazyRefcounts = Annotated[bool, typer.Option("--lazy-refcounts", help="Other programs may keep refcounts lazily.")]
Compression = Annotated[str, typer.Option("--compression", metavar="zlib|zstd", help="Of compressed clusters.")]
PreallocationOption = Annotated[
    str, typer.Option("--preallocation", metavar="off|metadata|falloc|full", help="What is there from the start.")
]
NewData = Annotated[str | None, typer.Option("--new-data", metavar="NAME", help="Put the disk's bytes into that file.")]
NewDataRaw = Annotated[bool, typer.Option("--new-data-raw", help="… which by itself is a raw image of the disk.")]


def _choice(what: str, value: str, *choices: str) -> Any:
    from vmm.errors import ConfigError

    if value not in choices:
        raise ConfigError(f"{what}: {value!r} is none of {', '.join(choices)}")
    return value


def _format(value: str | None) -> Any:
    return None if value is None else _choice("--format", value, "raw", "qcow2")


def _rule(value: str) -> Any:
    return _choice("--allow-backing", value, "dir", "any", "none")


def _shown(what: str) -> tuple[Callable[[int, int], None], ProgressLine]:
    """(a progress function that may be called often, the line)"""
    line, last = ProgressLine(), 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.1:
            last = now
            line(what, min(done, total - 1), total)

    return progress, line


NEW_IMAGE: dict[str, tuple[str, Any, Any]] = {
    "cluster_size": ("cluster_size", ClusterSize, "64K"),
    "refcount_bits": ("refcount_bits", RefcountBits, 16),
    "qcow2_version": ("version", Version, 3),
    "extended_l2": ("extended_l2", ExtendedL2, False),
    "lazy_refcounts": ("lazy_refcounts", LazyRefcounts, False),
    "compression": ("compression", Compression, "zlib"),
    "preallocation": ("preallocation", PreallocationOption, "off"),
    "new_data": ("data", NewData, None),
    "new_data_raw": ("data_raw", NewDataRaw, False),
}
"""What a command that makes an image can be told of it: parameter -> name in virtio.images.create, option, default."""


def _makes_an_image(command: Callable[..., None]) -> Callable[..., None]:
    """Add the parameters of NEW_IMAGE to a command, which gets their values as its argument `made`."""
    own = inspect.signature(command, eval_str=True)
    parameters = [item.replace(kind=item.KEYWORD_ONLY) for item in own.parameters.values() if item.name != "made"]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=option, default=default)
        for name, (_, option, default) in NEW_IMAGE.items()
    ]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        command(made={name: values.pop(name) for name in NEW_IMAGE}, **values)

    with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {item.name: item.annotation for item in parameters}
    return with_options


def _options(format: str, made: dict[str, Any]) -> dict[str, Any]:
    """What a new image is to be, as virtio.images.create takes it. `made`: values of NEW_IMAGE. Raises ConfigError."""
    from vmm.convert import parse_size
    from vmm.errors import ConfigError

    _choice("--preallocation", made["preallocation"], "off", "metadata", "falloc", "full")
    if format == "raw":
        for name, (_, _, default) in NEW_IMAGE.items():
            if made[name] != default and name != "preallocation":
                raise ConfigError(f"--{name.replace('_', '-')}: a raw image has none; it belongs to qcow2")
        return {"preallocation": made["preallocation"]}
    found = {key: made[name] for name, (key, _, _) in NEW_IMAGE.items()}
    return {**found, "cluster_size": parse_size("--cluster-size", made["cluster_size"])}


@app.command()
@_makes_an_image
def create(
    file: File,
    size: Annotated[str | None, typer.Argument(metavar="[SIZE]", help="Of the disk, as 20G.")] = None,
    format: Annotated[str, typer.Option("--format", metavar="raw|qcow2", help="Of the new image.")] = "qcow2",
    backing: Annotated[
        str | None, typer.Option("--backing", metavar="NAME", help="What is not written is read from that image.")
    ] = None,
    backing_format: Annotated[str | None, typer.Option("--backing-format", metavar="raw|qcow2")] = None,
    *,
    made: dict[str, Any],
) -> None:
    """Make a new image, in place of FILE if there is one. A backing file is named as seen from FILE's directory."""
    from vmm import disks
    from vmm.convert import parse_size

    _choice("--format", format, "raw", "qcow2")
    options = _options(format, made)
    if backing is not None:
        options |= {"backing": backing, "backing_format": _format(backing_format)}
    progress, line = _shown(f"making {file}")
    if format == "qcow2":
        options["progress"] = progress
    try:
        disks.create_disk(file, None if size is None else parse_size("size", size), cast(Any, format), **options)
    finally:
        line.clear()


@app.command()
def info(file: File, as_json: Json = False, format: FormatOption = None) -> None:
    """Say what an image is. No file that it names is opened."""
    from vmm import disks

    facts = disks.info(file, format=_format(format))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    snapshots = facts.pop("snapshots", [])
    for name, value in facts.items():
        shown = value
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif name in ("size", "file_size", "disk_usage", "cluster_size"):
            shown = f"{value} ({_human(value)})"
        typer.echo(f"{name.replace('_', ' ')}: {_printable(str(shown))}")
    if snapshots:
        _print_snapshots(snapshots)


def _human(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _printable(text: str) -> str:
    """Names come from the image: nothing in them may steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _print_snapshots(snapshots: list[dict[str, Any]]) -> None:
    rows = [("ID", "NAME", "SIZE", "TAKEN")]
    for item in snapshots:
        try:
            taken = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item["taken"]))
        except (OverflowError, ValueError, OSError):
            taken = "-"
        rows.append((_printable(item["id"]), _printable(item["name"]), _human(item["size"]), taken))
    print_table(rows)


@app.command()
def check(
    file: File,
    repair: Annotated[bool, typer.Option("--repair", help="Make it consistent.")] = False,
    as_json: Json = False,
) -> None:
    """Compare a qcow2 image's tables. Exit status 1: inconsistent; 5: only lost clusters; 0: neither, or repaired."""
    from vmm import disks

    progress, line = _shown(f"checking {file}")
    try:
        report, repaired = disks.check(file, repair=repair, progress=progress)
    finally:
        line.clear()
    if as_json:
        typer.echo(json.dumps({**vars(report), "repaired": repaired}))
    else:
        for problem in report.problems[:SHOWN]:
            typer.echo(problem)
        if len(report.problems) > SHOWN:
            typer.echo("…")
        state = "consistent" if report.clean else f"{report.corruptions} errors, {report.leaks} lost clusters"
        used = f"{report.allocated} of {report.total} clusters allocated, {report.packed} compressed"
        typer.echo(f"{file}: {state}; {used}, {report.fragmented} fragmented{'; repaired' if repaired else ''}")
        if report.dirty and not repaired:
            typer.echo(f"{file}: its last writer did not end well; it is repaired when it is next written")
    if not repaired and (report.corruptions or report.corrupt):
        sys.exit(EXIT_CORRUPT)
    if not repaired and report.leaks:
        sys.exit(EXIT_LEAKS)


@app.command()
@_makes_an_image
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A disk image.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The image to make; replaced if it is there.")],
    to: Annotated[str, typer.Option("--to", metavar="raw|qcow2", help="Format of TARGET.")] = "qcow2",
    compress: Annotated[bool, typer.Option("--compress", help="Compress the clusters of TARGET.")] = False,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", metavar="NAME", help="As SOURCE was at that snapshot.")
    ] = None,
    format: Annotated[str | None, typer.Option("--format", metavar="raw|qcow2", help="Format of SOURCE.")] = None,
    allow_backing: BackingRule = "dir",
    data: DataOption = None,
    *,
    made: dict[str, Any],
) -> None:
    """Copy a disk into a new image without backing files. Zeroes take no space."""
    from vmm import disks

    _choice("--to", to, "raw", "qcow2")
    options = _options(to, made)
    progress, line = _shown(f"writing {target}")
    try:
        disks.convert(
            source,
            target,
            source_format=_format(format),
            format=to,
            backing=_rule(allow_backing),
            data=data,
            snapshot=snapshot,
            compress=compress,
            options=options,
            progress=progress,
        )
    finally:
        line.clear()


@app.command(context_settings={"ignore_unknown_options": True})
def resize(
    file: File,
    size: Annotated[str, typer.Argument(metavar="SIZE|+SIZE|-SIZE", help="The new size, or by how much it changes.")],
    shrink: Annotated[bool, typer.Option("--shrink", help="What is behind the new end may be lost.")] = False,
    format: FormatOption = None,
    allow_backing: BackingRule = "dir",
    data: DataOption = None,
) -> None:
    """Make a disk larger or smaller."""
    from vmm import disks
    from vmm.convert import parse_size
    from vmm.errors import ConfigError

    sign = size[:1] if size[:1] in "+-" else ""
    wanted = parse_size("size", size.removeprefix(sign) if sign else size)
    if sign:
        old = disks.size_of(file, format=_format(format))
        wanted = old + wanted if sign == "+" else old - wanted
        if wanted <= 0:
            raise ConfigError(f"{file}: has {old} bytes; nothing would be left")
    disks.resize(file, wanted, format=_format(format), shrink=shrink, backing=_rule(allow_backing), data=data)


@app.command()
def snapshot(
    file: File,
    create: Annotated[str | None, typer.Option("--create", metavar="NAME", help="Keep the disk as it is now.")] = None,
    apply: Annotated[str | None, typer.Option("--apply", metavar="NAME", help="Go back; what is now is lost.")] = None,
    delete: Annotated[str | None, typer.Option("--delete", metavar="NAME", help="Forget one.")] = None,
    as_json: Json = False,
) -> None:
    """List the internal snapshots of a qcow2 image, or take, apply or delete one."""
    from vmm import disks
    from vmm.errors import ConfigError

    wanted = [(action, name) for action, name in (("create", create), ("apply", apply), ("delete", delete)) if name]
    if len(wanted) > 1:
        raise ConfigError("--create, --apply and --delete exclude each other; give one")
    if wanted:
        disks.snapshot(file, cast(Any, wanted[0][0]), wanted[0][1])
        return
    found = disks.info(file).get("snapshots", [])
    if as_json:
        typer.echo(json.dumps(found))
    elif found:
        _print_snapshots(found)


@app.command()
def commit(
    file: File,
    keep: Annotated[bool, typer.Option("--keep", help="Do not empty FILE.")] = False,
    allow_backing: BackingRule = "dir",
) -> None:
    """Write what FILE holds into its backing file, and empty FILE. Other images over that file become wrong."""
    from vmm import disks

    progress, line = _shown(f"committing {file}")
    try:
        where = disks.commit(file, keep=keep, backing=_rule(allow_backing), progress=progress)
    finally:
        line.clear()
    typer.echo(f"{where}: has what {file} held")


@app.command()
def rebase(
    file: File,
    backing: Annotated[
        str | None, typer.Option("--backing", metavar="NAME", help="The new backing file, seen from FILE's directory.")
    ] = None,
    backing_format: Annotated[str | None, typer.Option("--backing-format", metavar="raw|qcow2")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="No backing file any more: copy all that is needed.")] = False,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Change the name only: the file was moved.")] = False,
    allow_backing: BackingRule = "dir",
) -> None:
    """Give an image another backing file, or none. The disk stays what it is."""
    from vmm import disks
    from vmm.errors import ConfigError

    if (backing is None) == (not alone):
        raise ConfigError("give either --backing NAME or --alone")
    progress, line = _shown(f"rebasing {file}")
    try:
        disks.rebase(
            file,
            backing,
            _format(backing_format),
            unsafe=unsafe,
            backing=_rule(allow_backing),
            progress=progress,
        )
    finally:
        line.clear()
