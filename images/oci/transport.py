"""HTTP to registries: endpoints with their mirrors, TLS, proxies, repeated attempts.

urllib3 does the protocol: it is blocking, which suits the threads that pull layers, safe between them, follows
redirects without taking credentials to another host, and depends on nothing. Whatever goes wrong is an ImageError of
one line.
$XDG_CONFIG_HOME/loopvisor/registries.toml has a table for each registry: mirrors = […], insecure, ca. *any thread*
"""

from __future__ import annotations

import os
import re
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from images.errors import ImageError

if TYPE_CHECKING:
    import urllib3

ATTEMPTS = 6
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds between attempts: doubled each time, or what the server asks for, up to a limit."""
CONNECT_SECONDS, READ_SECONDS = 15.0, 60.0
REDIRECTS = 10
AGAIN = (408, 425, 429, 500, 502, 503, 504)
DOCKER_HUB = "registry-1.docker.io"
CERTIFICATES = ("/etc/docker/certs.d", "/etc/containers/certs.d", "~/.config/containers/certs.d")
_LOOPBACK = re.compile(r"localhost|127(?:\.\d{1,3}){3}|\[::1\]")


@dataclass(frozen=True, slots=True)
class RegistryEndpoint:
    """Where a registry, or a mirror of it, answers. `url` without the /v2/."""

    url: str
    host: str
    insecure: bool = False
    ca: str = ""


class Refused(ImageError):
    """A status that is no success. `status`, and the headers that came with it."""

    def __init__(self, message: str, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(message, "config" if status in (401, 403, 404) else "host")
        self.status, self.headers = status, headers


def endpoints(registry: str) -> list[RegistryEndpoint]:
    """Where to ask, in this order: the mirrors that are configured, then the registry."""
    configured = _configuration().get(registry, {})
    found = []
    for mirror in configured.get("mirrors", []):
        host = urlsplit(mirror).netloc
        own = _configuration().get(host, {})
        found.append(RegistryEndpoint(mirror.rstrip("/"), host, bool(own.get("insecure")), str(own.get("ca", ""))))
    host = DOCKER_HUB if registry == "docker.io" else registry
    insecure, ca = bool(configured.get("insecure")), str(configured.get("ca", ""))
    found.append(RegistryEndpoint(f"https://{host}", host, insecure, ca))
    if insecure or _LOOPBACK.fullmatch(re.sub(r":\d+$", "", host)):
        found.append(RegistryEndpoint(f"http://{host}", host))  # as docker does for loopback
    return found


def _configuration() -> dict[str, dict[str, Any]]:
    base = os.environ.get("XDG_CONFIG_HOME")
    path = (Path(base) if base else Path.home() / ".config") / "loopvisor" / "registries.toml"
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{path}: {error}", "config") from error
    import tomllib

    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ImageError(f"{path}: {error}", "config") from error
    for registry, table in value.items():
        if not isinstance(table, dict) or not set(table) <= {"mirrors", "insecure", "ca"}:
            raise ImageError(f"{path}: {registry}: a table with mirrors, insecure or ca is expected", "config")
        mirrors = table.get("mirrors", [])
        if not isinstance(mirrors, list) or not all(_is_url(item) for item in mirrors):
            raise ImageError(f"{path}: {registry}: mirrors is a list of URLs", "config")
    return value


def _is_url(value: object) -> bool:
    return isinstance(value, str) and urlsplit(value).scheme in ("http", "https") and bool(urlsplit(value).netloc)


class RegistryTransport:
    """Requests to one endpoint, over connections that are kept."""

    def __init__(self, endpoint: RegistryEndpoint, stopped: Callable[[], bool] = lambda: False) -> None:
        self.endpoint = endpoint
        self._stopped = stopped
        self._pools: dict[str, Any] = {}
        self._context: ssl.SSLContext | None = None

    def close(self) -> None:
        """Close the connections."""
        for pool in self._pools.values():
            pool.clear()

    def open(
        self, method: str, url: str, headers: Mapping[str, str], *, attempts: int = ATTEMPTS, body: bytes | None = None
    ) -> urllib3.BaseHTTPResponse:
        """An answer whose content is still to be read; the caller releases it. Raises Refused for a status of 400 and
        above, ImageError if there is none."""
        http = _library()
        pause = FIRST_PAUSE
        while True:
            attempts -= 1
            try:
                answer: urllib3.BaseHTTPResponse = self._pool(url).request(
                    method, url, headers={"User-Agent": "loopvisor", **headers}, body=body, preload_content=False,
                    retries=http.Retry(total=None, connect=0, read=0, redirect=REDIRECTS, status=0, other=0),
                    timeout=http.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
                )  # fmt: skip
            except http.exceptions.HTTPError as error:
                if attempts <= 0 or _is_final(error):
                    raise ImageError(f"{urlsplit(url).netloc}: {_reason(error)}") from error
            else:
                if answer.status < 400:
                    return answer
                text = answer.read(4096, decode_content=True).decode(errors="replace")
                answer.release_conn()
                if answer.status not in AGAIN or attempts <= 0:
                    raise Refused(_said(url, answer.status, text), answer.status, dict(answer.headers.items()))
                pause = max(pause, _wanted_pause(answer.headers.get("Retry-After", "")))
            if self._stopped():
                raise ImageError(f"{urlsplit(url).netloc}: given up")
            time.sleep(min(pause, LONGEST_PAUSE))
            pause *= 2

    def read(self, url: str, headers: Mapping[str, str], limit: int, body: bytes | None = None) -> bytes:
        """A whole answer, `limit` bytes at most."""
        http = _library()
        answer = self.open("GET" if body is None else "POST", url, headers, body=body)
        try:
            data = answer.read(limit + 1, decode_content=True)
        except http.exceptions.HTTPError as error:
            raise ImageError(f"{urlsplit(url).netloc}: {_reason(error)}") from error
        finally:
            answer.release_conn()
        if len(data) > limit:
            raise ImageError(f"{urlsplit(url).netloc}: an answer of more than {limit} bytes")
        return bytes(data)

    def _pool(self, url: str) -> Any:
        """The connections for a URL: through a proxy, if the environment names one for it."""
        parts = urlsplit(url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme, proxies.get("all", ""))
        if proxy and urllib.request.proxy_bypass(parts.netloc):
            proxy = ""
        if proxy not in self._pools:
            http = _library()
            if not proxy:
                manager = http.PoolManager(maxsize=8)
            else:
                address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
                given = f"{unquote(address.username or '')}:{unquote(address.password or '')}"
                own = http.make_headers(proxy_basic_auth=given) if address.username else None
                manager = http.ProxyManager(
                    f"{address.scheme}://{address.netloc.rpartition('@')[2]}", proxy_headers=own, maxsize=8
                )

            def with_tls(host: str, port: int, **settings: Any) -> Any:
                return http.HTTPSConnectionPool(host, port, **settings | {"ssl_context": self._tls()})

            manager.pool_classes_by_scheme = {**manager.pool_classes_by_scheme, "https": with_tls}
            self._pools[proxy] = manager
        return self._pools[proxy]

    def _tls(self) -> ssl.SSLContext:
        """Made for the first connection that wants it: reading the host's authorities takes as long as ten requests."""
        if self._context is None:
            context = ssl.create_default_context()
            if self.endpoint.insecure:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            try:
                if self.endpoint.ca:
                    context.load_verify_locations(os.path.expanduser(self.endpoint.ca))
                for folder in (Path(item).expanduser() / self.endpoint.host for item in CERTIFICATES):
                    for path in sorted(folder.glob("*.crt")):
                        context.load_verify_locations(path)
                    for path in sorted(folder.glob("*.cert")):
                        context.load_cert_chain(path, path.with_suffix(".key"))
            except (OSError, ssl.SSLError) as error:
                raise ImageError(f"certificates for {self.endpoint.host}: {error}", "config") from error
            self._context = context
        return self._context


def _library() -> Any:
    try:
        import urllib3
    except ImportError as error:
        raise ImageError(
            "pulling from a registry needs urllib3; run: pip install 'loopvisor[oci]'", "config"
        ) from error
    return urllib3


def _is_final(error: Exception) -> bool:
    """What another attempt does not change: certificates, plain HTTP where TLS is expected, names, nobody listening."""
    text = repr(error)
    final = ("SSL", "NameResolution", "Connection refused", "TooManyRedirects", "ResponseError")
    return any(word in text for word in final)


def _reason(error: Exception) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        why = re.search(r"certificate verify failed: ([^(]*)", text)
        said = f": {why[1].strip()}" if why else ""
        return f"its certificate is not trusted{said}; name its CA in registries.toml, or in /etc/docker/certs.d"
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        return "it does not speak TLS; for plain HTTP set insecure = true in registries.toml"
    if "NameResolution" in repr(error) or "Name or service" in text or "resolve" in text:
        return "no such host"
    for word in ("Connection refused", "timed out", "Network is unreachable", "IncompleteRead", "Connection reset"):
        if word in text:
            return word.lower()
    return " ".join(text.split())[-200:]


def _said(url: str, status: int, text: str) -> str:
    """One line of an answer that is an error (Distribution specification, "Error Codes")."""
    import json

    said = ""
    try:
        first = json.loads(text)["errors"][0]
        said = str(first.get("message") or first.get("code") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        pass
    clean = " ".join(ascii(said)[1:-1].split())[:200]
    return f"{urlsplit(url).netloc}: {status}{': ' + clean if clean else ''}"


def _wanted_pause(text: str) -> float:
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0
