"""What E2B's API has and this server has not: answered with 501 and one line that says what to do instead.

Without this a client would be told "404: Not Found", which reads as if its template or volume were not there.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, HTTPException

ABSENT = {
    "template builds": (
        "a template is an image: name one, as oci:python:3.12, or give it a name by vmm serve --template NAME=IMAGE",
        ("/templates", "/v2/templates", "/v3/templates", "/templates/{rest:path}", "/v2/templates/{rest:path}",
         "/v3/templates/{rest:path}"),
    ),
    "volumes": ("write files into the sandbox, or put them into its image", ("/volumes", "/volumes/{rest:path}")),
    "secrets": ("give envs when the sandbox is created", ("/secrets", "/secrets/{rest:path}")),
    "snapshots as templates": (
        "pause the sandbox and connect to it again",
        ("/snapshots", "/snapshots/{rest:path}", "/sandboxes/{id}/snapshots"),
    ),
    "forks": ("create another sandbox of the template", ("/sandboxes/{id}/fork",)),
    "logs of sandboxes": ("read what commands print", ("/sandboxes/{id}/logs", "/v2/sandboxes/{id}/logs")),
    "changing the network of a sandbox that runs": ("say it when the sandbox is created", ("/sandboxes/{id}/network",)),
}  # fmt: skip
"""What is not there: (the way out, the paths by which clients ask for it)."""
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def _answer(what: str, way_out: str) -> Callable[[], None]:
    def refuse() -> None:
        raise HTTPException(501, f"this server has no {what}; {way_out}")

    return refuse


def register(app: FastAPI) -> None:
    """Answer for everything of ABSENT; it is no part of the published API."""
    for what, (way_out, paths) in ABSENT.items():
        for path in paths:
            app.api_route(path, methods=METHODS, include_in_schema=False, name=f"no {what}")(_answer(what, way_out))
