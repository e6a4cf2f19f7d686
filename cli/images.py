"""`vmm images`: build, list, find, remove."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from cli.errors import EXIT_CONFIG, EXIT_HOST
from cli.progress import ProgressLine
from cli.table import print_table

app = typer.Typer(help="Build and manage guest images.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MIB = 1 << 20


@contextmanager
def _one_line_errors(progress: ProgressLine | None = None) -> Iterator[None]:
    from images.errors import ImageError

    try:
        yield
    except (ImageError, OSError) as error:
        if progress:
            progress.clear()
        text = str(error)
        if isinstance(error, OSError):
            text = f"{error.filename or 'cache'}: {(error.strerror or text).lower()}"
        typer.echo(f"vmm: {text}", err=True)
        raise typer.Exit(EXIT_CONFIG if getattr(error, "kind", "host") == "config" else EXIT_HOST) from error


@app.command()
def build(names: Annotated[list[str], typer.Argument(help="Recipes, by name or by the path of a .toml file.")]) -> None:
    """Build images; what is up to date stays. A download that was interrupted goes on where it stopped."""
    from images import builder

    progress = ProgressLine()
    with _one_line_errors(progress):
        for name in names:
            typer.echo(str(builder.build(name, progress).directory))


@app.command()
def pull(names: Annotated[list[str], typer.Argument(help="OCI images, as oci:debian:12.")]) -> None:
    """Get OCI images, anew if a registry has another one of that name now."""
    from images.errors import ImageError
    from images.oci import find

    progress = ProgressLine()
    with _one_line_errors(progress):
        for name in names:
            if not find.is_oci(name):
                raise ImageError(f"{name}: write oci:{name}; vmm images build makes the others", "config")
            typer.echo(str(find.resolve(name, progress, "always").disk.parent))


@app.command()
def ls(as_json: Json = False) -> None:
    """List what `vmm run` knows by name."""
    from images import builder, cache, catalog
    from images.built import current
    from images.oci import store

    with _one_line_errors():
        cache.sweep()
        found: list[dict[str, Any]] = []
        for name, description, built in catalog.names():
            row: dict[str, Any] = {"name": name, "description": description, "built": built}
            if (place := current(name)) is not None:
                row["size"] = builder.size_on_disk(place.directory)
                row["made"] = (place.directory / "manifest.json").stat().st_mtime
                row["directory"] = str(place.directory)
            found.append(row)
        for name, oci, looked_up in store.listed():
            program = " ".join((*oci.settings.entrypoint, *oci.settings.command))
            row = {"name": name, "description": "".join(char if char.isprintable() else " " for char in program)}
            row |= {"built": True, "size": oci.size, "made": looked_up, "directory": str(oci.disk.parent)}
            found.append(row)
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [("NAME", "BUILT", "SIZE", "DESCRIPTION")]
    for row in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["made"])) if "made" in row else "-"
        size = f"{row['size'] / MIB:.0f}M" if "size" in row else "-"
        comes = "with vmm" if row["built"] and "made" not in row else made
        rows.append((str(row["name"]), comes, size, str(row["description"])))
    print_table(rows)


@app.command()
def path(name: str) -> None:
    """Print where a built image is."""
    from images import catalog
    from images.built import current

    with _one_line_errors():
        if name.startswith(catalog.OCI_SCHEMES):
            from images.oci import find

            typer.echo(str(find.resolve(name, lambda what, done, total: None, "never").disk.parent))
            return
        built = current(name)
        typer.echo(str(built.directory if built else catalog.resolve(name).kernel))


@app.command()
def rm(names: list[str]) -> None:
    """Remove built images."""
    from images import builder
    from images.oci import find

    with _one_line_errors():
        for name in names:
            if not (find.remove(name) if find.is_oci(name) else builder.remove(name)):
                typer.echo(f"vmm: image {name} is not built; nothing to remove", err=True)
                raise typer.Exit(EXIT_CONFIG)


@app.command()
def prune() -> None:
    """Remove builds and packages that nothing uses any more, pulled layers, and what interrupted downloads left."""
    from images import builder
    from images.oci import store

    with _one_line_errors():
        typer.echo(f"freed {(builder.prune() + store.prune()) / 1e6:.1f} MB")
