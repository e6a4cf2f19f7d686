"""Where container images come from: references, layouts, saved archives, and registries that behave in every way."""

from __future__ import annotations

import base64
import gzip
import http.server
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from images.errors import ImageError
from images.oci import credentials, find, reference, registry, store, transport
from images.oci.model import ImageSettings
from tests.support.oci import blobs, configuration, digest, entry, layer, layout, saved

LAYERS = [layer(entry("etc/os", data=b"one\n")), layer(entry("bin/x", data=os.urandom(3 << 20), mode=0o755))]
WISHES = {"Entrypoint": ["/bin/x"], "Cmd": ["-a", "b c"], "Env": ["A=1"], "User": "me", "WorkingDir": "/w",
          "StopSignal": "SIGINT", "ExposedPorts": {"80/tcp": {}}}  # fmt: skip


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, folder in (("LOOPVISOR_CACHE", "cache"), ("XDG_CONFIG_HOME", "config"), ("DOCKER_CONFIG", "docker")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY",
                 "HTTPS_PROXY", "ALL_PROXY"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(registry, "FIRST_PAUSE", 0.01)
    return tmp_path


# -- references


@pytest.mark.parametrize(("text", "whole"), [
    ("python", "docker.io/library/python:latest"),
    ("python:3.12", "docker.io/library/python:3.12"),
    ("user/name", "docker.io/user/name:latest"),
    ("docker.io/python:3", "docker.io/library/python:3"),
    ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
    ("localhost/a", "localhost/a:latest"),
    ("ghcr.io/a/b", "ghcr.io/a/b:latest"),
    ("[::1]:5000/a", "[::1]:5000/a:latest"),
    ("a@sha256:" + "0" * 64, "docker.io/library/a@sha256:" + "0" * 64),
    ("h.io/a:t@sha256:" + "0" * 64, "h.io/a@sha256:" + "0" * 64),
])  # fmt: skip
def test_references(text: str, whole: str) -> None:
    assert str(reference.parse(text)) == whole


@pytest.mark.parametrize("text", ["Upper", "a:", "a b", "a@sha256:12", "a//b", "-a", "h.io/", "a:ta/g", "a" * 300])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ImageError):
        reference.parse(text)


# -- files


@pytest.mark.parametrize("kind", ["directory", "tar", "tar.gz", "saved", "saved.gz"])
def test_images_in_files(own_places: Path, kind: str) -> None:
    place = own_places / f"image.{kind}"
    if kind.startswith("saved"):
        saved(place, LAYERS, **WISHES)
        if kind.endswith("gz"):
            place.write_bytes(gzip.compress(place.read_bytes()))
        name = f"docker-archive:{place}"
    else:
        folder = layout(own_places / "folder", LAYERS, **WISHES)
        name = f"oci:{folder}"
        if kind != "directory":
            files = [path for path in folder.rglob("*") if path.is_file()]
            data = layer(*[entry(str(path.relative_to(folder)), data=path.read_bytes()) for path in files])
            place.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
            name = f"oci:{place}"
    built = find.resolve(name, quiet)
    assert built.settings == ImageSettings(("/bin/x",), ("-a", "b c"), ("A=1",), "me", "/w", 2, ("80/tcp",))
    assert built.disk.stat().st_size > 3 << 20
    assert find.resolve(name, quiet) == built


def test_the_same_image_is_built_once(own_places: Path) -> None:
    one = find.resolve(f"oci:{layout(own_places / 'layout', LAYERS, **WISHES)}", quiet)
    two = find.resolve(f"docker-archive:{saved(own_places / 'saved.tar', LAYERS, **WISHES)}:made/here:1", quiet)
    assert one.disk == two.disk
    assert len(store.listed()) == 2
    for name, _, _ in store.listed():
        assert one.disk.exists() and find.remove(name)
    assert not one.disk.exists() and not store.listed()


def test_names_are_chosen_among_several(own_places: Path) -> None:
    folder = layout(own_places / "several", LAYERS, tag="v1")
    index = json.loads((folder / "index.json").read_text())
    other = {**index["manifests"][0], "annotations": {"org.opencontainers.image.ref.name": "v2"}}
    (folder / "index.json").write_text(json.dumps({**index, "manifests": [*index["manifests"], other]}))
    assert find.resolve(f"oci:{folder}:v2", quiet).disk.exists()
    for tag, said in (("", "several images; add :TAG; there are: v1, v2"), (":v3", "no image v3")):
        with pytest.raises(ImageError, match=said):
            find.resolve(f"oci:{folder}{tag}", quiet)


def test_a_platform_is_chosen_or_named(own_places: Path) -> None:
    folder = layout(own_places / "platforms", LAYERS)
    item = json.loads((folder / "index.json").read_text())["manifests"][0]
    del item["annotations"]

    def write(*platforms: dict[str, str]) -> None:
        manifests = [{**item, "platform": platform} for platform in platforms]
        (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))

    arm = {"os": "linux", "architecture": "arm64", "variant": "v8"}
    write(arm, {"os": "linux", "architecture": "amd64"})
    assert find.resolve(f"oci:{folder}", quiet).disk.exists()
    write(arm, {"os": "linux", "architecture": "amd64", "variant": "v3"})
    with pytest.raises(ImageError, match="no image for linux/amd64; there are: linux/amd64/v3, linux/arm64/v8"):
        find.resolve(f"oci:{folder}", quiet)


@pytest.mark.parametrize("what", ["layer", "config", "manifest", "missing", "cut", "layers", "json", "list"])
def test_damaged_layouts_are_one_line(own_places: Path, what: str) -> None:
    packed = [gzip.compress(item, 1, mtime=0) for item in LAYERS]
    folder = layout(own_places / "damaged", LAYERS, packed)
    found, manifest = blobs(LAYERS, packed)
    names = {"layer": digest(packed[1]), "config": digest(configuration(LAYERS)), "manifest": manifest,
             "missing": digest(packed[0]), "cut": digest(packed[1])}  # fmt: skip
    if what in names:
        path = folder / "blobs" / "sha256" / names[what].partition(":")[2]
        data = bytearray(found[names[what]])
        data[len(data) // 2] ^= 255
        path.write_bytes(data[: len(data) // 2] if what == "cut" else data)
        if what == "missing":
            path.unlink()
    elif what == "layers":
        folder = layout(own_places / "more", LAYERS, [*packed, packed[0]])
    else:
        (folder / "index.json").write_text("[" * 100_000 if what == "json" else '{"schemaVersion": 2, "manifests": 3}')
    with pytest.raises(ImageError) as error:
        find.resolve(f"oci:{folder}", quiet)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not list(own_places.glob("cache/oci/built/*"))


# -- a registry that misbehaves as it is told


class Misbehaving(http.server.ThreadingHTTPServer):
    """Serves one image as test/image:1; `behave` may answer a request itself."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs, self.manifest = blobs(LAYERS, **WISHES)
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.behave: Callable[[Any], bool] = lambda handler: False
        self.name = f"127.0.0.1:{self.server_address[1]}"

    def big(self) -> str:
        """The digest of the largest blob."""
        return max(self.blobs, key=lambda key: len(self.blobs[key]))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some of the tests want."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Misbehaving

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silence."""

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.do_GET()

    def do_GET(self) -> None:
        self.server.seen.append((self.command, self.path, dict(self.headers.items())))
        if self.server.behave(self):
            return
        match = re.fullmatch(r"/v2/test/image/(manifests|blobs)/(\S+)", self.path)
        key = self.server.manifest if match and match[2] == "1" else match[2] if match else ""
        if key not in self.server.blobs:
            self.answer(404, b'{"errors": [{"message": "unknown\\u001b[31m"}]}')
        else:
            self.answer(200, self.server.blobs[key])

    def answer(self, status: int, data: bytes, cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    with Misbehaving() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def pull(server: Misbehaving, version: str = ":1", how: str = "always") -> store.OciImage:
    return find.resolve(f"oci:{server.name}/test/image{version}", quiet, how)


def test_an_image_is_pulled_once_and_remembered(server: Misbehaving) -> None:
    built = pull(server, how="missing")
    assert built.settings.command == ("-a", "b c")
    asked = len(server.seen)
    assert pull(server, how="missing") == built and pull(server, how="never") == built and len(server.seen) == asked
    assert pull(server) == built
    assert pull(server, f"@{server.manifest}") == built
    assert not any("blobs" in path for _, path, _ in server.seen[asked:] if server.big() in path)
    with pytest.raises(ImageError, match="404: unknown.*there is no such image") as error:
        pull(server, ":2")
    assert "\x1b" not in str(error.value)
    with pytest.raises(ImageError, match="not here"):
        pull(server, ":2", "never")


def test_a_broken_connection_is_gone_on_with(server: Misbehaving) -> None:
    whole = server.blobs[server.big()]
    ranges: list[str] = []

    def behave(handler: Handler) -> bool:
        if server.big() not in handler.path:
            return False
        wanted = handler.headers.get("Range", "bytes=0-")
        ranges.append(wanted)
        start = int(wanted[6:-1])
        more = {"Content_Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"} if start else {}
        handler.answer(206 if start else 200, whole[start:], 1_000_000, **more)
        return True

    server.behave = behave
    assert pull(server).disk.exists()
    assert len(ranges) >= 3 and ranges[1] != "bytes=0-"


@pytest.mark.parametrize("how", ["ignores ranges", "always cuts", "wrong content", "too much", "too little", "416"])
def test_a_server_that_never_gives_the_layer_is_one_line(server: Misbehaving, how: str) -> None:
    whole = server.blobs[server.big()]

    def behave(handler: Handler) -> bool:
        if server.big() not in handler.path:
            return False
        if how == "416" and "Range" in handler.headers:
            handler.answer(416, b"")
        elif how in ("ignores ranges", "416"):
            handler.answer(200, whole, len(whole) // 2)
        elif how == "always cuts":
            handler.answer(200, whole, 0)
        else:
            wrong = {"wrong content": bytes(len(whole)), "too much": whole + b"x", "too little": whole[:-1]}
            handler.answer(200, wrong[how])
        return True

    server.behave = behave
    with pytest.raises(ImageError) as error:
        pull(server)
    assert "\n" not in str(error.value) and server.name in str(error.value)
    assert len(server.seen) < 50


def test_what_came_before_a_kill_is_used(server: Misbehaving, own_places: Path) -> None:
    whole = server.blobs[server.big()]
    part = own_places / "cache" / "oci" / "blobs" / "sha256" / f"{server.big()[7:]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:2_000_000])

    def behave(handler: Handler) -> bool:
        if server.big() not in handler.path:
            return False
        assert handler.headers["Range"] == "bytes=2000000-"
        handler.answer(206, whole[2_000_000:], Content_Range=f"bytes 2000000-{len(whole) - 1}/{len(whole)}")
        return True

    server.behave = behave
    assert pull(server).disk.exists()


def test_busy_servers_are_asked_again(server: Misbehaving) -> None:
    left = [503, 429, 500]

    def behave(handler: Handler) -> bool:
        if left:
            handler.answer(left.pop(), b"", Retry_After="0")
            return True
        return False

    server.behave = behave
    assert pull(server).disk.exists()


# -- who we are


def login(own_places: Path, value: dict[str, Any]) -> None:
    (own_places / "docker").mkdir(exist_ok=True)
    (own_places / "docker" / "config.json").write_text(json.dumps(value))


def basic(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def guard(server: Misbehaving, wanted: str, challenge: str) -> None:
    def behave(handler: Handler) -> bool:
        if handler.headers.get("Authorization") == wanted or not handler.path.startswith("/v2"):
            return False
        handler.answer(401, b"{}", WWW_Authenticate=challenge)
        return True

    server.behave = behave


def test_basic_authentication_from_the_docker_configuration(server: Misbehaving, own_places: Path) -> None:
    guard(server, f"Basic {basic('me:s3:cret')}", 'Basic realm="here"')
    with pytest.raises(ImageError, match=rf"401.*docker login {server.name}"):
        pull(server)
    login(own_places, {"auths": {server.name: {"auth": basic("me:s3:cret")}}})
    assert pull(server).disk.exists()


@pytest.mark.parametrize("helper_says", ["me", "<token>"])
def test_a_token_is_got_with_what_a_helper_knows(
    server: Misbehaving, own_places: Path, monkeypatch: pytest.MonkeyPatch, helper_says: str
) -> None:
    program = own_places / "docker-credential-test"
    answer = json.dumps({"ServerURL": server.name, "Username": helper_says, "Secret": "geheim"})
    program.write_text(f'#!/bin/sh\n[ "$1 $(cat)" = "get {server.name}" ] || exit 1\necho \'{answer}\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{own_places}:{os.environ['PATH']}")
    login(own_places, {"credHelpers": {server.name: "test"}})
    realm = f"http://{server.name}/token"
    guard(server, "Bearer abc", f'Bearer realm="{realm}",service="the service",scope="repository:test/image:pull"')
    before = server.behave
    asked: list[tuple[str, str | None, bytes]] = []

    def behave(handler: Handler) -> bool:
        if not handler.path.startswith("/token"):
            return before(handler)
        body = getattr(handler, "body", b"")
        asked.append((handler.path, handler.headers.get("Authorization"), body))
        handler.answer(200, b'{"token": "abc"}' if handler.command == "GET" else b'{"access_token": "abc"}')
        return True

    server.behave = behave
    assert pull(server).disk.exists()
    assert len(asked) == 1
    if helper_says == "me":
        assert asked[0][0] == "/token?service=the+service&scope=repository%3Atest%2Fimage%3Apull"
        assert asked[0][1] == f"Basic {basic('me:geheim')}"
    else:
        assert b"refresh_token=geheim" in asked[0][2] and asked[0][1] is None


def test_credentials_do_not_follow_a_redirect(server: Misbehaving, own_places: Path) -> None:
    login(own_places, {"auths": {server.name: {"auth": basic("me:secret")}}})
    guard(server, f"Basic {basic('me:secret')}", "Basic")
    before = server.behave
    with Misbehaving() as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def behave(handler: Handler) -> bool:
            if before(handler):
                return True
            if "/blobs/" in handler.path:
                handler.answer(307, b"", Location=f"http://localhost:{other.server_address[1]}{handler.path}")
                return True
            return False

        server.behave = behave
        try:
            assert pull(server).disk.exists()
        finally:
            other.shutdown()
            thread.join()
    assert other.seen and not any("Authorization" in headers for _, _, headers in other.seen)


def test_a_helper_that_fails_is_named(own_places: Path) -> None:
    login(own_places, {"credsStore": "is-not-there"})
    with pytest.raises(ImageError, match="docker-credential-is-not-there is not installed"):
        credentials.find("h.io", "a")
    login(own_places, {"credsStore": "../../bin/sh"})
    with pytest.raises(ImageError, match="no name of a credential helper"):
        credentials.find("h.io", "a")


# -- mirrors and proxies


def configure(own_places: Path, text: str) -> None:
    (own_places / "config" / "loopvisor").mkdir(parents=True, exist_ok=True)
    (own_places / "config" / "loopvisor" / "registries.toml").write_text(text)


def test_mirrors_are_asked_first_and_the_next_if_they_fail(server: Misbehaving, own_places: Path) -> None:
    configure(own_places, f'["registry.invalid"]\nmirrors = ["http://127.0.0.1:1", "http://{server.name}"]\n')
    assert find.resolve("oci:registry.invalid/test/image:1", quiet).disk.exists()
    configure(own_places, "['h.io']\nmirror = 3\n")
    with pytest.raises(ImageError, match="mirrors, insecure or ca"):
        find.resolve("oci:h.io/a", quiet)


def test_a_proxy_of_the_environment_is_used(
    server: Misbehaving, own_places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:pass@{server.name}")
    configure(own_places, '["registry.invalid"]\nmirrors = ["http://mirror.invalid"]\n')

    def behave(handler: Handler) -> bool:
        assert handler.headers["Proxy-Authorization"] == f"Basic {basic('user:pass')}"
        handler.path = handler.path.removeprefix("http://mirror.invalid")
        return False

    server.behave = behave
    assert find.resolve("oci:registry.invalid/test/image:1", quiet).disk.exists()
    assert server.seen[0][1].startswith("http://mirror.invalid/v2/")
