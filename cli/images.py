"""`vmm images`: build, list, find, remove."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

app = typer.Typer(help="Build and manage guest images.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Progress:
    """One line on a terminal that is drawn again and again; nothing in a pipe."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._width = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self._terminal:
            return
        filled = 20 * done // max(total, 1)
        line = f"[{'=' * filled}{' ' * (20 - filled)}] {what}"
        sys.stderr.write("\r" + line.ljust(self._width))
        self._width = len(line)
        if done >= total:
            sys.stderr.write("\r" + " " * self._width + "\r")
        sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line, before a message."""
        if self._terminal and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            self._width = 0


@contextmanager
def _one_line_errors(progress: Progress | None = None) -> Iterator[None]:
    from images.errors import ImageError

    try:
        yield
    except ImageError as error:
        if progress:
            progress.clear()
        typer.echo(f"vmm: {error}", err=True)
        raise typer.Exit(2 if error.kind == "config" else 4) from error
    except OSError as error:
        if progress:
            progress.clear()
        typer.echo(f"vmm: {error.filename or 'cache'}: {(error.strerror or str(error)).lower()}", err=True)
        raise typer.Exit(4) from error


@app.command()
def build(names: Annotated[list[str], typer.Argument(help="Recipes, by name or by the path of a .toml file.")]) -> None:
    """Build images; what is up to date stays."""
    from images import builder

    progress = Progress()
    with _one_line_errors(progress):
        for name in names:
            typer.echo(str(builder.build(name, progress).directory))


@app.command()
def ls(as_json: Json = False) -> None:
    """List what `vmm run` knows by name."""
    from images import catalog

    with _one_line_errors():
        rows = catalog.names()
    if as_json:
        keys = ("name", "description", "built")
        typer.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    for name, description, built in rows:
        typer.echo(f"{name:<12} {'' if built else '(not built) '}{description}")


@app.command()
def path(name: str) -> None:
    """Print where a built image is."""
    from images import builder, catalog

    with _one_line_errors():
        built = builder.current(name)
        typer.echo(str(built.directory if built else catalog.resolve(name).kernel))


@app.command()
def rm(names: list[str]) -> None:
    """Remove built images."""
    from images import builder

    with _one_line_errors():
        for name in names:
            if not builder.remove(name):
                typer.echo(f"vmm: image {name} is not built; nothing to remove", err=True)
                raise typer.Exit(2)


@app.command()
def prune() -> None:
    """Remove builds and packages that nothing uses any more."""
    from images import builder

    with _one_line_errors():
        typer.echo(f"freed {builder.prune() / 1e6:.1f} MB")
