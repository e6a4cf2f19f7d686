"""The control API: sandboxes are made, found, paused, taken up and ended. Its OpenAPI document is /openapi.json.

Paths, fields and statuses are those of E2B's API, as its clients use it. Loop thread.
"""

from __future__ import annotations

import datetime
import time
import urllib.parse
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import vmm
from vmm.errors import ConfigError, GuestError, HostError, VmmError
from vmm.guest.tools import GuestMeasure, GuestTools
from vmm.sandboxes.serve import absent
from vmm.sandboxes.serve.files import failure
from vmm.sandboxes.serve.fleet import Draining, Fleet, LimitReached, NotThere, Wish, WrongPhase, matching
from vmm.sandboxes.serve.hosted import Hosted
from vmm.sandboxes.serve.tokens import Tenant, Tokens

ENVD_VERSION = "0.6.4"
"""Of the inner surface, by which clients know what it can."""
CLIENT_ID = "loopvisor"
PAGE = 100
MAX_ENTRIES = 64
"""Entries of metadata, and variables of the environment, of one sandbox."""
MAX_TEXT = 4096
EVERYWHERE = "0.0.0.0/0"
RESUME_SECONDS = 300

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Texts = Annotated[dict[Annotated[str, Field(min_length=1, max_length=256)], Text], Field(max_length=MAX_ENTRIES)]
Seconds = Annotated[int, Field(ge=0, le=1 << 31, description="Seconds from now.")]


class ClientBody(BaseModel):
    """What a client sends. Fields that are not known are passed over, for clients are newer than servers."""

    model_config = ConfigDict(populate_by_name=True, extra="ignore")


class ErrorBody(BaseModel):
    """Every answer of 400 and above."""

    code: int
    message: str


class AutoResume(ClientBody):
    """Whether a request to a paused sandbox takes it up."""

    enabled: bool = False


class NetworkWish(ClientBody):
    """Where a sandbox may connect to: names and networks."""

    allow_out: Annotated[list[Text], Field(alias="allowOut", max_length=MAX_ENTRIES)] = []
    deny_out: Annotated[list[Text], Field(alias="denyOut", max_length=MAX_ENTRIES)] = []


class NewSandbox(ClientBody):
    """A sandbox to be made."""

    template_id: Annotated[str, Field(alias="templateID", max_length=512)]
    timeout: Seconds = 15
    auto_pause: Annotated[bool, Field(alias="autoPause")] = False
    auto_pause_memory: Annotated[bool, Field(alias="autoPauseMemory")] = True
    auto_resume: Annotated[AutoResume | None, Field(alias="autoResume")] = None
    allow_internet_access: bool | None = None
    network: NetworkWish | None = None
    metadata: Texts = {}
    env_vars: Annotated[Texts, Field(alias="envVars")] = {}
    volume_mounts: Annotated[list[Any] | None, Field(alias="volumeMounts")] = None
    mcp: dict[str, Any] | None = None
    iam: dict[str, Any] | None = None


class ConnectBody(ClientBody):
    """Take a sandbox up, if it is paused, and have it live so long."""

    timeout: Seconds = RESUME_SECONDS
    memory: bool | None = None


class TimeoutBody(ClientBody):
    """How long it lives from now."""

    timeout: Seconds


class PauseBody(ClientBody):
    """How it is put down."""

    memory: bool = True


class RefreshBody(ClientBody):
    """How long it lives from now, at least."""

    duration: Seconds = 15


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _created(box: Hosted, domain: str) -> dict[str, Any]:
    sheet = box.sheet
    return {
        "templateID": sheet.template,
        "sandboxID": sheet.id,
        "clientID": CLIENT_ID,
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": sheet.access_token,
        "domain": domain,
    }


def _listed(box: Hosted) -> dict[str, Any]:
    sheet = box.sheet
    return {
        "templateID": sheet.template,
        "sandboxID": sheet.id,
        "clientID": CLIENT_ID,
        "startedAt": _time(sheet.started_at),
        "endAt": _time(sheet.end_at),
        "cpuCount": sheet.cpus,
        "memoryMB": sheet.memory >> 20,
        "diskSizeMB": sheet.disk >> 20,
        "metadata": sheet.metadata,
        "state": "paused" if box.phase == "paused" else "running",
        "envdVersion": ENVD_VERSION,
    }


def _detail(box: Hosted, domain: str) -> dict[str, Any]:
    sheet = box.sheet
    lifecycle = {"autoResume": sheet.resumes, "onTimeout": "pause" if sheet.pauses else "kill"}
    return {
        **_listed(box),
        "envdAccessToken": sheet.access_token,
        "domain": domain,
        "allowInternetAccess": sheet.internet,
        "lifecycle": lifecycle,
    }


def _wish(body: NewSandbox) -> Wish:
    for name, value in (("volumeMounts", body.volume_mounts), ("mcp", body.mcp), ("iam", body.iam)):
        if value:
            raise ConfigError(f"{name}: this server has no such thing")
    if body.auto_pause and not body.auto_pause_memory:
        raise ConfigError("autoPauseMemory: this server keeps memory when it pauses")
    allow = tuple(body.network.allow_out) if body.network is not None else ()
    deny = tuple(body.network.deny_out) if body.network is not None else ()
    if any(one != EVERYWHERE for one in deny):
        raise ConfigError(f"network.denyOut: {EVERYWHERE} is possible, with what is allowed in allowOut")
    internet = body.allow_internet_access
    if deny and not allow:
        internet = False
    for name in body.env_vars:
        if "=" in name or "\0" in name:
            raise ConfigError(f"envVars: {name[:60]!r} is no name of a variable")
    return Wish(
        template=body.template_id,
        lifetime=body.timeout,
        metadata=body.metadata,
        env=body.env_vars,
        pauses=body.auto_pause,
        resumes=body.auto_resume is not None and body.auto_resume.enabled,
        internet=internet,
        allow=() if EVERYWHERE in allow else allow,
    )


def _status(error: VmmError) -> int:
    if isinstance(error, NotThere):
        return 404
    if isinstance(error, LimitReached):
        return 429
    if isinstance(error, Draining):
        return 503
    if isinstance(error, ConfigError):
        return 400
    if isinstance(error, WrongPhase):
        return 409
    return 502 if isinstance(error, GuestError) else 500


def _filter(
    metadata: str | None, state: list[str] | None, template: str | None, started_after: datetime.datetime | None
) -> Callable[[Hosted], bool]:
    """Which sandboxes a list is of. Raises ConfigError."""
    pairs = urllib.parse.parse_qsl(metadata or "", keep_blank_values=True, max_num_fields=MAX_ENTRIES)
    wanted = {urllib.parse.unquote(name): urllib.parse.unquote(value) for name, value in pairs}
    states = {word for item in state or () for word in item.split(",")} or {"running", "paused"}
    if not states <= {"running", "paused"}:
        raise ConfigError("state: running and paused are possible")
    after = started_after.timestamp() if started_after is not None else 0.0

    def keep(box: Hosted) -> bool:
        sheet = box.sheet
        return (
            box.phase in states
            and all(sheet.metadata.get(name) == value for name, value in wanted.items())
            and (template is None or sheet.template == template)
            and sheet.started_at > after
        )

    return keep


def _metric(box: Hosted, measure: GuestMeasure, percent: float) -> dict[str, Any]:
    memory, now = measure.memory, time.time()
    total = memory.get("MemTotal", 0)
    return {
        "timestamp": _time(now),
        "timestampUnix": int(now),
        "cpuCount": box.sheet.cpus,
        "cpuUsedPct": percent,
        "memUsed": max(0, total - memory.get("MemAvailable", 0)),
        "memTotal": total,
        "memCache": memory.get("Cached", 0),
        "diskUsed": max(0, measure.disk_total - measure.disk_free),
        "diskTotal": measure.disk_total,
    }


async def _measure(box: Hosted) -> dict[str, Any]:
    measure = await GuestTools(box.vm.agent).measure()
    ticks, before = measure.cpu_ticks, box.ticks
    box.ticks = ticks
    spent = [now - then for now, then in zip(ticks, before or (0,) * len(ticks), strict=False)]
    idle = sum(spent[3:5])  # idle and waiting for disks (proc_stat(5))
    percent = 100.0 * (sum(spent) - idle) / sum(spent) if sum(spent) > 0 else 0.0
    return _metric(box, measure, round(max(0.0, percent), 2))


Id = Annotated[str, Path(alias="sandbox_id", max_length=64)]
Key = Annotated[str, Header(alias="X-API-Key", max_length=512)]
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 409, 413, 429, 500, 502, 503)
}


def tenant_of(request: Request, key: Key = "") -> Tenant:
    """Who calls."""
    bearer = request.headers.get("authorization", "")
    token = key or (bearer[7:] if bearer.lower().startswith("bearer ") else "")
    tokens: Tokens = request.app.state.tokens
    tenant = tokens.find(token)
    if tenant is None:
        raise HTTPException(401, "no valid token: set E2B_API_KEY to one of the server's token file")
    return tenant


Caller = Annotated[Tenant, Depends(tenant_of)]


def application(fleet: Fleet, tokens: Tokens, domain: str) -> FastAPI:
    """The ASGI application. `domain`: behind "PORT-ID." the host name of a port of a sandbox."""

    app = FastAPI(
        title="loopvisor sandboxes",
        version=vmm.__version__,
        description="Sandboxes as the clients of E2B's API ask for them: each a machine of its own.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.tokens = tokens

    @app.exception_handler(VmmError)
    async def of_ours(_: Request, error: VmmError) -> JSONResponse:
        text = str(error) if not isinstance(error, HostError) else f"the server cannot: {error}"
        return failure(_status(error), text)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first.get("loc", ())[1:])
        return failure(400, f"{where or 'body'}: {first.get('msg', 'is not valid')}")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> JSONResponse:
        """Clients read every answer as JSON; the server's log has the traceback."""
        return failure(500, "the server has a fault of its own, which its log names")

    @app.get("/health", status_code=204)
    async def health() -> None:
        """The server answers, and takes sandboxes."""
        if fleet.draining:
            raise Draining("the server is about to end")

    async def create(body: NewSandbox, tenant: Caller, request: Request) -> dict[str, Any]:
        """Make a sandbox of a template: an image's name, or oci: and what a registry calls it."""
        box = await fleet.create(_wish(body), tenant)
        if await request.is_disconnected():  # nobody knows that it is there
            await fleet.kill(box)
        return _created(box, domain)

    for path in ("/sandboxes", "/v2/sandboxes"):
        app.post(path, status_code=201, name=f"create {path}")(create)

    @app.get("/v2/sandboxes")
    async def listing(
        response: Response,
        tenant: Caller,
        metadata: Annotated[str | None, Query(max_length=MAX_TEXT)] = None,
        state: Annotated[list[str] | None, Query(max_length=4)] = None,
        template: Annotated[str | None, Query(max_length=512)] = None,
        started_after: Annotated[datetime.datetime | None, Query(alias="startedAfter")] = None,
        order: Literal["asc", "desc"] = "desc",
        limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
        next_token: Annotated[str | None, Query(alias="nextToken", max_length=64)] = None,
    ) -> list[dict[str, Any]]:
        """The caller's sandboxes, a page at a time: the header X-Next-Token leads to the next."""
        found = matching(fleet.list(tenant), _filter(metadata, state, template, started_after))
        if order == "asc":
            found.reverse()
        if next_token is not None:
            time_text, _, last = next_token.partition("-")
            try:
                mark = float.fromhex(time_text), last
            except ValueError:
                raise ConfigError("nextToken: not one of this server's") from None
            found = [
                box
                for box in found
                if ((box.sheet.started_at, box.sheet.id) > mark) == (order == "asc")
                and (box.sheet.started_at, box.sheet.id) != mark
            ]
        if len(found) > limit:
            last_one = found[limit - 1].sheet
            response.headers["X-Next-Token"] = f"{last_one.started_at.hex()}-{last_one.id}"
        return [_listed(box) for box in found[:limit]]

    @app.get("/sandboxes")
    async def running(tenant: Caller, metadata: str | None = None) -> list[dict[str, Any]]:
        """The caller's running sandboxes, all at once."""
        found = matching(fleet.list(tenant), _filter(metadata, ["running"], None, None))
        return [_listed(box) for box in found]

    @app.get("/sandboxes/{sandbox_id}")
    async def detail(sandbox_id: Id, tenant: Caller) -> dict[str, Any]:
        """One sandbox."""
        return _detail(fleet.find(sandbox_id, tenant), domain)

    @app.delete("/sandboxes/{sandbox_id}", status_code=204)
    async def kill(sandbox_id: Id, tenant: Caller) -> None:
        """End it, running or paused."""
        await fleet.kill(fleet.find(sandbox_id, tenant))

    @app.post("/sandboxes/{sandbox_id}/pause", status_code=204)
    async def pause(sandbox_id: Id, tenant: Caller, body: PauseBody | None = None) -> None:
        """Put it down, with its memory; 409 if it is already."""
        if body is not None and not body.memory:
            raise ConfigError("memory: this server keeps memory when it pauses")
        await fleet.pause(fleet.find(sandbox_id, tenant))

    async def connect(
        sandbox_id: Id, tenant: Caller, response: Response, body: ConnectBody | None = None
    ) -> dict[str, Any]:
        """Take it up if it is paused (201), and have it live so long."""
        body = body or ConnectBody()
        if body.memory is False:
            raise ConfigError("memory: this server takes sandboxes up with their memory")
        box = fleet.find(sandbox_id, tenant)
        response.status_code = 201 if await fleet.resume(box, body.timeout, tenant) else 200
        return _created(box, domain)

    for path in ("/sandboxes/{sandbox_id}/connect", "/v2/sandboxes/{sandbox_id}/connect"):
        app.post(path, name=f"connect {path}")(connect)

    @app.post("/sandboxes/{sandbox_id}/resume", status_code=201)
    async def resume(sandbox_id: Id, tenant: Caller, body: ConnectBody | None = None) -> dict[str, Any]:
        """Take it up; 409 if it runs."""
        box = fleet.find(sandbox_id, tenant)
        if box.phase == "running":
            raise WrongPhase(f"the sandbox {box.sheet.id} is running")
        await fleet.resume(box, (body or ConnectBody()).timeout, tenant)
        return _created(box, domain)

    @app.post("/sandboxes/{sandbox_id}/timeout", status_code=204)
    async def timeout(sandbox_id: Id, body: TimeoutBody, tenant: Caller) -> None:
        """Have it live so long from now, longer or shorter than before."""
        fleet.set_timeout(fleet.find(sandbox_id, tenant), body.timeout, tenant)

    @app.post("/sandboxes/{sandbox_id}/refreshes", status_code=204)
    async def refresh(sandbox_id: Id, tenant: Caller, body: RefreshBody | None = None) -> None:
        """Have it live so long from now, at least."""
        seconds = (body or RefreshBody()).duration
        fleet.set_timeout(fleet.find(sandbox_id, tenant), seconds, tenant, longer=True)

    @app.get("/sandboxes/{sandbox_id}/metrics")
    async def metrics(sandbox_id: Id, tenant: Caller) -> list[dict[str, Any]]:
        """What it uses now: processors since the last time that this was asked for, memory, disk."""
        box = fleet.find(sandbox_id, tenant)
        return [await _measure(box)] if box.phase == "running" else []

    absent.register(app)
    return app
