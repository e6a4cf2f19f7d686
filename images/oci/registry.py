"""An image in a registry: its manifest, and its layers, pulled in parallel into the cache, and resumed after a break.

Source: the OCI Distribution specification 1.1, "Pull"; the Docker Registry's token authentication. Blobs are checked by
their digest while they come, and stand in oci/blobs/ALGORITHM/ afterwards for other images. *any thread*
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

from images import cache
from images.errors import ImageError
from images.oci import credentials, model
from images.oci.model import Descriptor, ImageManifest
from images.oci.reference import Reference
from images.oci.source import Tell, checked, read_manifest
from images.oci.transport import ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE, Refused, RegistryTransport, endpoints

if TYPE_CHECKING:
    import urllib3

T = TypeVar("T")

PARALLEL = 4
CHUNK = 256 << 10
MAX_TOKEN = 1 << 20
ACCEPT = ", ".join([*model.INDEXES, *model.MANIFESTS])
_CHALLENGE = re.compile(r'(\w+)=(?:"([^"]*)"|([^\s,"]+))')
RANGE_NOT_SATISFIABLE = 416
TAKEN_TWICE = 2
"""Attempts at a blob whose content was wrong."""


class Registry:
    """One image of a registry; implements Source."""

    def __init__(self, wanted: Reference) -> None:
        self.name = f"oci:{wanted}"
        self._wanted = wanted
        self._stopped = threading.Event()
        self._workers = ThreadPoolExecutor(PARALLEL, thread_name_prefix="oci-pull")
        self._transport: RegistryTransport | None = None
        self._authorization = ""
        self._authorizing = threading.Lock()
        self._telling = threading.Lock()

    def find(self) -> ImageManifest:
        """Ask the mirrors, then the registry."""
        failures: list[tuple[bool, ImageError]] = []
        for endpoint in endpoints(self._wanted.registry):
            is_fallback = bool(failures) and endpoint.url == f"http://{self._wanted.registry}"
            if is_fallback and (isinstance(failures[-1][1], Refused) or "certificate" in str(failures[-1][1])):
                break  # it speaks TLS; plain HTTP is for those that do not
            self._transport = RegistryTransport(endpoint, self._stopped.is_set)
            self._authorization = ""
            try:
                return self._find()
            except ImageError as error:
                self._transport.close()
                failures.append((is_fallback, error))
        # Of several places the registry itself, the last, says it best; plain HTTP only if somebody answered there.
        told = [error for is_fallback, error in failures if not is_fallback or isinstance(error, Refused)][-1]
        raise ImageError(f"{self.name}: {told}{self._way_out(told)}", told.kind) from told

    def open_layers(self, manifest: ImageManifest, tell: Tell) -> list[Future[BinaryIO]]:
        """Pull what is not there yet, PARALLEL layers at a time."""
        total = sum(layer.size for layer in manifest.layers)
        done: dict[int, int] = {}

        def count(number: int, size: int) -> None:
            with self._telling:
                done[number] = size
                tell(f"pulling {len(manifest.layers)} layers", sum(done.values()), max(total, 1 << 20))

        return [
            self._workers.submit(self._layer, layer, lambda size, number=number: count(number, size))  # type: ignore[misc]
            for number, layer in enumerate(manifest.layers)
        ]

    def close(self) -> None:
        """What was begun ends; what came stays for the next time."""
        self._stopped.set()
        self._workers.shutdown(cancel_futures=True)
        if self._transport is not None:
            self._transport.close()

    def _find(self) -> ImageManifest:
        data = self._document(f"manifests/{self._wanted.version}", {"Accept": ACCEPT})
        digest = model.digest_of(data, self._wanted.digest or "sha256:")
        if self._wanted.digest and digest != self._wanted.digest:
            raise ImageError("the manifest has another digest than was asked for")

        def fetch(wanted: Descriptor) -> bytes:
            is_manifest = wanted.media_type in model.INDEXES + model.MANIFESTS
            what = f"{'manifests' if is_manifest else 'blobs'}/{wanted.digest}"
            return checked(self._document(what, {"Accept": ACCEPT} if is_manifest else {}), wanted, self.name)

        return read_manifest(fetch, data, self.name, digest, lambda found: model.choose(found, self.name))

    def _document(self, what: str, headers: dict[str, str]) -> bytes:
        return self._authorized(lambda own: self._to().read(self._url(what), {**headers, **own}, model.MAX_DOCUMENT))

    def _to(self) -> RegistryTransport:
        assert self._transport is not None
        return self._transport

    def _url(self, what: str) -> str:
        return f"{self._to().endpoint.url}/v2/{self._wanted.repository}/{what}"

    def _authorized(self, ask: Callable[[dict[str, str]], T]) -> T:
        """What `ask` gives for the headers that say who we are, which are got when they are asked for."""
        used = self._authorization
        try:
            return ask({"Authorization": used} if used else {})
        except Refused as error:
            if error.status != 401:
                raise
            challenge = next((value for key, value in error.headers.items() if key.lower() == "www-authenticate"), "")
            with self._authorizing:
                if self._authorization == used:  # nobody else has got a new one meanwhile
                    self._authorization = self._authorize(challenge)
                fresh = self._authorization
            if not fresh:
                raise
            return ask({"Authorization": fresh})

    def _authorize(self, challenge: str) -> str:
        """The Authorization header that answers a challenge (RFC 9110, 11.6.1); "" if we have nothing to say."""
        host = self._to().endpoint.host
        known = credentials.find("docker.io" if host.endswith("docker.io") else host, self._wanted.repository)
        scheme, _, rest = challenge.strip().partition(" ")
        if scheme.lower() == "basic":
            return known.basic if known is not None and known.user else ""
        if scheme.lower() != "bearer":
            return ""
        values = {key.lower(): quoted or bare for key, quoted, bare in _CHALLENGE.findall(rest)}
        realm = urljoin(self._to().endpoint.url, values.get("realm", ""))
        if urlsplit(realm).scheme not in ("http", "https") or (
            known is not None and urlsplit(realm).scheme == "http" and self._to().endpoint.url.startswith("https:")
        ):
            raise ImageError(f"{host}: it wants our password sent to {realm[:100]}, which is not safe")
        scope = values.get("scope") or f"repository:{self._wanted.repository}:pull"
        asked = {"service": values.get("service", ""), "scope": scope}
        asked = {key: value for key, value in asked.items() if value}
        if known is not None and known.identity_token:
            more = {"grant_type": "refresh_token", "refresh_token": known.identity_token, "client_id": "loopvisor"}
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            data = self._to().read(realm, form, MAX_TOKEN, urlencode(asked | more).encode())
        else:
            separator = "&" if "?" in realm else "?"
            own = {"Authorization": known.basic} if known is not None else {}
            data = self._to().read(f"{realm}{separator}{urlencode(asked)}", own, MAX_TOKEN)
        value = model.document(data, host)
        token = value.get("token") or value.get("access_token")
        if not isinstance(token, str) or not token.isprintable():
            raise ImageError(f"{host}: the answer of {realm[:100]} has no token")
        return f"Bearer {token}"

    def _layer(self, layer: Descriptor, tell: Callable[[int], None]) -> BinaryIO:
        """A blob of the cache, pulled unless it is there."""
        algorithm, _, value = layer.digest.partition(":")
        path = cache.directory("oci", "blobs", algorithm) / value
        with cache.host_errors(), cache.lock(f"blob-{value[:32]}"):
            if not path.exists():
                part = path.with_suffix(".part")
                for attempt in range(TAKEN_TWICE):
                    if self._pull(layer, part, tell):
                        break
                    part.unlink(missing_ok=True)
                    if attempt + 1 == TAKEN_TWICE:
                        raise ImageError(
                            f"{self.name}: layer {layer.digest[:19]}… comes with another content each time"
                        )
                os.replace(part, path)
        tell(layer.size)
        return path.open("rb")

    def _pull(self, layer: Descriptor, part: Path, tell: Callable[[int], None]) -> bool:
        """Fetch into `part`, from where it stopped before; whether the content is what it should be."""
        where = f"{self.name}: layer {layer.digest[:19]}…"
        hasher = model.hasher(layer.digest)
        with part.open("ab+") as file:
            file.seek(0)
            while data := file.read(CHUNK):
                hasher.update(data)
            useless, begun = 0, 0
            while (have := file.tell()) < layer.size:
                failure: ImageError | None = None
                try:
                    going_on = self._continue(layer, file, hasher, tell)
                except ImageError as error:
                    if isinstance(error, Refused) and error.status != RANGE_NOT_SATISFIABLE:
                        raise ImageError(f"{where}: {error}", error.kind) from error
                    failure, going_on = error, not isinstance(error, Refused)
                if not going_on:
                    file.seek(0)
                    file.truncate()
                    hasher = model.hasher(layer.digest)
                    begun += 1
                useless = 0 if file.tell() > have else useless + 1
                if useless >= ATTEMPTS or begun >= ATTEMPTS:
                    raise ImageError(f"{where}: {failure or 'the connection ends too early each time'}")
                if self._stopped.wait(min(FIRST_PAUSE * 2**useless, LONGEST_PAUSE) if useless else 0):
                    raise ImageError(f"{where}: given up")
            return file.tell() == layer.size and f"{hasher.name}:{hasher.hexdigest()}" == layer.digest

    def _continue(self, layer: Descriptor, file: IO[bytes], hasher: Any, tell: Callable[[int], None]) -> bool:
        """Read on from the file's end. False: the server does not go on there."""
        have = file.tell()
        headers = {"Range": f"bytes={have}-"} if have else {}
        answer = self._authorized(
            lambda own: self._to().open("GET", self._url(f"blobs/{layer.digest}"), {**headers, **own})
        )
        try:
            if have and not (
                answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            ):
                return False
            for data in _chunks(answer):
                have += len(data)
                if have > layer.size:
                    raise Refused("it sends more than the manifest says", 0, {})
                file.write(data)
                hasher.update(data)
                tell(have)
                if self._stopped.is_set():
                    break
        finally:
            file.flush()
            answer.release_conn()
        return True

    def _way_out(self, error: ImageError) -> str:
        status = error.status if isinstance(error, Refused) else 0
        if status in (401, 403):
            return f"; there is no such image, or you have to log in: docker login {self._wanted.registry}"
        return "; there is no such image" if status == 404 else ""


def _chunks(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """The content as it was sent. Raises ImageError where the connection ends too early."""
    import urllib3

    try:
        yield from answer.stream(CHUNK, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ImageError(f"the connection broke off: {' '.join(str(error).split())[-100:]}") from error
