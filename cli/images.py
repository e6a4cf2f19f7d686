"""`vmm images`: build, list, find, remove."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from cli.errors import EXIT_CONFIG, EXIT_HOST
from cli.table import print_table

app = typer.Typer(help="Build and manage guest images.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MIB = 1 << 20


class Progress:
    """One line on a terminal that is drawn again and again; nothing in a pipe."""

    WIDTH = 20

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._drawn = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`total` beyond a few steps is bytes."""
        if not self._terminal:
            return
        if done >= total and total < MIB:
            self.clear()
            return
        filled = self.WIDTH * min(done, total) // max(total, 1)
        amount = f"{done / MIB:6.1f} of {total / MIB:.1f} MiB  " if total >= MIB else ""
        line = f"[{'=' * filled:<{self.WIDTH}}] {amount}{what}"
        try:
            import os

            line = line[: os.get_terminal_size(2).columns - 1]  # a longer one would not be drawn over
        except OSError:
            pass
        if line != self._drawn:
            sys.stderr.write("\r" + line.ljust(len(self._drawn)))
            sys.stderr.flush()
            self._drawn = line

    def clear(self) -> None:
        """Remove the line, before a message."""
        if self._drawn:
            sys.stderr.write("\r" + " " * len(self._drawn) + "\r")
            sys.stderr.flush()
            self._drawn = ""


@contextmanager
def _one_line_errors(progress: Progress | None = None) -> Iterator[None]:
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

    progress = Progress()
    with _one_line_errors(progress):
        for name in names:
            typer.echo(str(builder.build(name, progress).directory))


@app.command()
def ls(as_json: Json = False) -> None:
    """List what `vmm run` knows by name."""
    from images import builder, cache, catalog
    from images.built import current

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
        built = current(name)
        typer.echo(str(built.directory if built else catalog.resolve(name).kernel))


@app.command()
def rm(names: list[str]) -> None:
    """Remove built images."""
    from images import builder

    with _one_line_errors():
        for name in names:
            if not builder.remove(name):
                typer.echo(f"vmm: image {name} is not built; nothing to remove", err=True)
                raise typer.Exit(EXIT_CONFIG)


@app.command()
def prune() -> None:
    """Remove builds and packages that nothing uses any more, and what interrupted downloads left."""
    from images import builder

    with _one_line_errors():
        typer.echo(f"freed {builder.prune() / 1e6:.1f} MB")
