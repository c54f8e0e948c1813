"""What a request to the page may ask for: the routes that the page itself uses, and no file outside its folder.

The server behind it can do more (fetch addresses for a visitor, serve files, run functions by name). None of that is
needed here, so what is not listed is not there.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_API = "/gradio_api"
_READ = {
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt",
    f"{_API}/theme.css", f"{_API}/startup-events", f"{_API}/queue/data", f"{_API}/upload_progress",
}  # fmt: skip
_READ_BELOW = ("/static/", "/assets/", f"{_API}/heartbeat/")
_FILE = f"{_API}/file="
_JOIN, _UPLOAD = f"{_API}/queue/join", f"{_API}/upload"
_WRITE = {_JOIN, _UPLOAD, f"{_API}/cancel", f"{_API}/reset"}

MAX_JSON = 256 * 1024
_MULTIPART = 64 * 1024  # what a form with one file has beside the file

HEADERS = {
    # Inline scripts and styles are the page's own; whatever it may hold, it can reach no other host.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: "
    "blob:; media-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action "
    "'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class RefusedError(Exception):
    """A request that is not let through.

    Attributes:
        status: Of the HTTP answer.
        reason: Its text.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class Guard:
    """ASGI middleware that lets through what the page needs.

    Args:
        app: The application behind it.
        folder: Where uploads and pictures lie; no path of a request may lead out of it.
        hosts: Names under which the server may be asked, without port; None for any. With the loopback names alone, a
            page of another site cannot reach it under a name of its own.
        max_upload: Bytes of an uploaded file.
    """

    def __init__(self, app: Application, *, folder: Path, hosts: Iterable[str] | None, max_upload: int) -> None:
        self._app = app
        self._folder = folder.resolve()
        self._hosts = None if hosts is None else frozenset(hosts)
        self._max_upload = max_upload

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise RefusedError(404, "not found")
            self.check(scope["method"], scope["path"], _headers(scope))
            if scope["method"] == "POST":
                receive = await self._bounded(scope, receive)
        except RefusedError as refusal:
            await _answer(refusal, scope, send)
            return
        await self._app(scope, receive, _with_headers(send))

    def check(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raise a ``RefusedError`` unless the page itself may ask this.

        Args:
            method: Of the request.
            path: Decoded.
            headers: By lower-case name.
        """
        host = headers.get("host", "")
        if self._hosts is not None and host.rpartition(":")[0] not in self._hosts and host not in self._hosts:
            raise RefusedError(403, "this server is asked under another name")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RefusedError(403, "this server answers its own page only")
        if method in ("GET", "HEAD"):
            known = path in _READ or path.startswith(_READ_BELOW)
            if path.startswith(_FILE):
                known = self.holds(path.removeprefix(_FILE))
        else:
            known = method == "POST" and path in _WRITE
        if not known or ".." in path.split("/"):
            raise RefusedError(404, "not found")

    def holds(self, path: object) -> bool:
        """Whether a path of a request leads into the folder, links and dots followed."""
        if not isinstance(path, str) or "\0" in path:
            return False
        given = Path(path)
        return given.is_absolute() and given.resolve().is_relative_to(self._folder)

    async def _bounded(self, scope: MutableMapping[str, Any], receive: Receive) -> Receive:
        """The body if it is small enough; of a call, one that names no file from elsewhere."""
        limit = self._max_upload + _MULTIPART if scope["path"] == _UPLOAD else MAX_JSON
        length = _headers(scope).get("content-length", "")
        # Without a length a body could go on without end, and browsers always give one.
        if not length.isdecimal():
            raise RefusedError(411, "the length of the body is missing")
        if int(length) > limit:
            raise RefusedError(413, f"the body is longer than {limit} bytes")
        if scope["path"] == _UPLOAD:
            return receive
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise RefusedError(413, f"the body is longer than {limit} bytes")
        self.check_call(body)
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            given = next(messages, None)
            return await receive() if given is None else given

        return replay

    def check_call(self, body: bytes) -> None:
        """Raise a ``RefusedError`` if a call is no JSON or names a file outside the folder."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            raise RefusedError(400, "the body is no JSON") from None
        for entry in _dicts(call):
            if entry.get("path") is not None and not self.holds(entry["path"]):
                raise RefusedError(403, "a file that was not uploaded here")


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield value
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)


def _headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _with_headers(send: Send) -> Send:
    extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *extra]
        await send(message)

    return sending


async def _answer(refusal: RefusedError, scope: MutableMapping[str, Any], send: Send) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.reason.encode()})
