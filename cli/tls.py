"""`vmm tls`: certificates for a daemon that others reach over the network, and for who may reach it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import say

app = typer.Typer(no_args_is_help=True, help="Certificates for vmm daemon, vmm receive and their clients.")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The authority's directory, as for vmm daemon --tls.")]
Client = Annotated[str, typer.Argument(metavar="NAME", help="The client, as its certificate will say.")]


@app.command()
def init(
    directory: Directory,
    host: Annotated[
        list[str] | None, typer.Option(help="A name or address of this host that clients will use; may be repeated.")
    ] = None,
    client: Annotated[list[str] | None, typer.Option(help="A client; may be repeated.")] = None,
) -> None:
    """Make an authority, the daemon's certificate and the first clients'."""
    from vmm.libvirt import pki

    hosts = host or [socket.gethostname()]
    made = pki.init(directory, hosts, client or ["admin"])
    say(f"on this host: vmm daemon --listen-tls 0.0.0.0 --tls {directory}")
    for folder in made:
        _tell(folder, hosts[0])


@app.command("client")
def add(directory: Directory, name: Client) -> None:
    """Make a certificate for one more client."""
    from vmm.libvirt import pki

    _tell(pki.add_client(directory, name), "HOST")


@app.command()
def revoke(directory: Directory, name: Client) -> None:
    """Let a client in no more. A running daemon hears of it by SIGHUP."""
    from vmm.libvirt import pki

    say(f"{pki.revoke(directory, name)} written; kill -HUP the daemon")


def _tell(folder: Path, host: str) -> None:
    say(f"for {folder.name}: copy {folder} there; virsh -c 'loopvisor+tls://{host}/system?pkipath=/PATH/{folder.name}'")
