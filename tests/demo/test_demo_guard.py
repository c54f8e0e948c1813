"""What the demo's server lets through. Needs neither Gradio nor a browser."""

import asyncio
import json

import pytest

from captum_lnstat.demo.guard import HEADERS, MAX_JSON, Guard, RefusedError

LOCAL = {"host": "127.0.0.1:7860"}


@pytest.fixture
def folder(tmp_path):
    """The server's folder with one upload, a secret beside it, and a link to the secret."""
    inside = tmp_path / "folder"
    inside.mkdir()
    (inside / "upload.png").write_bytes(b"an upload")
    (tmp_path / "secret").write_bytes(b"secret")
    (inside / "link").symlink_to(tmp_path / "secret")
    return inside


def guard(folder, app=None, hosts=("127.0.0.1", "localhost")):
    return Guard(app, folder=folder, hosts=hosts, max_upload=1000)


def refused(folder, method, path, headers=LOCAL, **options) -> int | None:
    try:
        guard(folder, **options).check(method, path, headers)
    except RefusedError as refusal:
        return refusal.status
    return None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/assets/index.js"),
        ("GET", "/gradio_api/queue/data"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/upload"),
    ],
)
def test_what_the_page_asks_for_is_let_through(folder, method, path):
    assert refused(folder, method, path) is None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=http://169.254.169.254/"),
        ("GET", "/gradio_api/proxy=http://example.com"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/predict"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/"),
        ("PUT", "/gradio_api/upload"),
        ("DELETE", "/"),
        ("GET", "/docs"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/assets/../gradio_api/proxy=http://example.com"),
    ],
)
def test_nothing_else_is(folder, method, path):
    assert refused(folder, method, path) == 404


def test_files_are_read_from_the_folder_only(folder):
    def status(path):
        return refused(folder, "GET", f"/gradio_api/file={path}")

    assert status(folder / "upload.png") is None
    for path in (
        folder / "link",
        folder.parent / "secret",
        f"{folder}/../secret",
        f"{folder}/../folder2/x",
        f"{folder}2/x",
        "upload.png",
        "../secret",
        f"{folder}/upload.png\0",
        "",
    ):
        assert status(path) == 404, path


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "127.0.0.2:7860"])
def test_a_page_of_another_site_cannot_take_the_servers_name(folder, host):
    assert refused(folder, "GET", "/", {"host": host}) == 403


def test_names_of_the_server(folder):
    for host in ("127.0.0.1", "127.0.0.1:1", "localhost:7860"):
        assert refused(folder, "GET", "/", {"host": host}) is None
    assert refused(folder, "GET", "/", {"host": "workstation:7860"}, hosts=None) is None


def test_only_the_page_itself_may_post(folder):
    own, other = LOCAL | {"origin": "http://127.0.0.1:7860"}, LOCAL | {"origin": "http://evil.example"}
    assert refused(folder, "POST", "/gradio_api/upload", own) is None
    assert refused(folder, "POST", "/gradio_api/upload", other) == 403
    assert refused(folder, "POST", "/gradio_api/upload", LOCAL | {"origin": "null"}) == 403


def test_a_call_names_files_of_the_folder_only(folder):
    checked = guard(folder)

    def call(value):
        checked.check_call(json.dumps({"data": [1, [value]]}).encode())

    call({"path": str(folder / "upload.png"), "url": "http://127.0.0.1:7860/x"})
    call({"path": None})
    for path in ("/etc/passwd", str(folder / "link"), f"{folder}/../secret", "http://example.com/x.png", "x", 3, {}):
        with pytest.raises(RefusedError, match="403"):
            call({"deeper": {"path": path}})
    for body in (b"no json", b"[" * 100_000, b"\xff"):
        with pytest.raises(RefusedError, match="400"):
            checked.check_call(body)


def ask(folder, method="POST", path="/gradio_api/queue/join", body=b"{}", length=None, kind="http"):
    """Status, headers and body of the answer, and what the application behind the guard was given."""
    given, sent = [], []

    async def behind(scope, receive, send):
        message = await receive()
        given.append(message.get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": b"answer"})

    parts = iter([body[:5], body[5:]])

    async def receive():
        part = next(parts, None)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": part == body[:5] and len(body) > 5}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost")]
    if length != "none":
        headers.append((b"content-length", str(len(body) if length is None else length).encode()))
    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    asyncio.run(guard(folder, behind)(scope, receive, send))
    return sent, given


def test_a_call_reaches_the_application_whole_and_the_answer_has_the_headers(folder):
    body = json.dumps({"data": ["x" * 50]}).encode()
    (start, end), given = ask(folder, body=body)
    assert given == [body]
    assert start["status"] == 200
    assert end["body"] == b"answer"
    assert dict(start["headers"]) == {b"x-own": b"1"} | {k.encode(): v.encode() for k, v in HEADERS.items()}


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"body": b'{"path": "/etc/passwd"}'}, 403),
        ({"body": b"x" * (MAX_JSON + 1)}, 413),
        ({"body": b"x" * (MAX_JSON + 1), "length": 10}, 413),
        ({"length": "none"}, 411),
        ({"length": "-1"}, 411),
        ({"path": "/gradio_api/upload", "length": 10**6}, 413),
        ({"method": "GET", "path": "/gradio_api/file=/etc/passwd"}, 404),
    ],
)
def test_what_is_refused_does_not_reach_the_application(folder, options, status):
    (start, end), given = ask(folder, **options)
    assert start["status"] == status
    assert given == []
    assert b"passwd" not in end["body"]


def test_a_small_upload_is_handed_on_unread(folder):
    _, given = ask(folder, path="/gradio_api/upload", body=b"--boundary and so on")
    assert given == [b"--bou"]


def test_there_are_no_websockets(folder):
    sent, given = ask(folder, kind="websocket")
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert given == []


def test_the_page_can_reach_no_other_host():
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert not any(word in value for value in policy.values() for word in ("http", "*", "ws:"))
