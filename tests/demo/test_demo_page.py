"""The demo as a visitor has it: the command's own server, asked by HTTP and used in a headless Chromium."""

import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers.browser import PATIENCE, until

from captum_lnstat import zoo
from captum_lnstat.demo.photo import MAX_BYTES

GRADIO = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason='gradio is not installed: pip install ".[demo]"'
)


@pytest.fixture
def server(tmp_path):
    """The running command: its process, its address, and the only folder it may write to."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {
        "TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ALLOWED_PATHS": "/",  # what stands in the environment must not open anything
        "GRADIO_SHARE": "True",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "captum_lnstat", "demo", "--port", "0", "--threads", "1"]
    log = tmp_path / "log"
    with log.open("w") as output:
        # Of a shell that runs the tests in the background it would inherit to ignore Ctrl-C.
        heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path, preexec_fn=heeding
        )
    try:
        until(lambda: "Ctrl-C stops it" in log.read_text() or process.poll() is not None, "the server starts")
        assert process.poll() is None, log.read_text()
        address = next(word for word in log.read_text().split() if word.startswith("http"))
        yield process, address, temporary, log
    finally:
        process.kill()
        process.wait(PATIENCE)


def ask(address, method, path, body=None, **headers):
    """Status and text of one request, sent as it stands."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace"), dict(answer.getheaders())
    finally:
        connection.close()


def check_requests(address, temporary):
    """What a hostile request may try."""
    status, text, headers = ask(address, "GET", "/")
    assert status == 200
    assert "connect-src 'self'" in headers["content-security-policy"]
    config = json.loads(ask(address, "GET", "/config")[1])
    assert config["analytics_enabled"] is False
    for path in ("/etc/passwd", str(temporary / "secret"), "http://127.0.0.1:1/", f"{temporary}/../secret"):
        status, text, _ = ask(address, "GET", f"/gradio_api/file={path}")
        assert status == 404, path
        assert "root:" not in text
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    taking = next(d["id"] for d in config["dependencies"] if d["targets"] and d["targets"][0][1] == "upload")
    plain = {"Content-Type": "application/json"}
    call = {"data": [file, None], "fn_index": taking, "session_hash": "s", "event_data": None}
    status, text, _ = ask(address, "POST", "/gradio_api/queue/join", json.dumps(call), **plain)
    assert status == 403
    assert text == "a file that was not uploaded here"
    # The same call with a file that is there gets through, so it is the path that was refused.
    own = next(temporary.rglob("*.webp"))
    call["data"] = [file | {"path": str(own)}, None]
    assert ask(address, "POST", "/gradio_api/queue/join", json.dumps(call), **plain)[0] == 200
    form = {"Content-Type": "multipart/form-data; boundary=b", "Content-Length": str(2 * MAX_BYTES)}
    assert ask(address, "POST", "/gradio_api/upload", None, **form)[0] == 413
    assert ask(address, "GET", "/", Host="evil.example")[0] == 403
    assert ask(address, "POST", "/gradio_api/upload", b"", Origin="http://evil.example")[0] == 403
    for path in ("/gradio_api/run/start", "/gradio_api/call/start", "/gradio_api/proxy=http://example.com"):
        assert ask(address, "POST" if "proxy" not in path else "GET", path, b"{}")[0] == 404


@GRADIO
def test_the_server_gives_away_nothing_and_leaves_nothing(server, tmp_path):
    process, address, temporary, log = server
    (temporary / "secret").write_text("root: secret")
    check_requests(address, temporary)
    (folder,) = temporary.glob("captum-lnstat-demo-*")
    assert any(folder.rglob("*.webp"))
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert log.read_text().splitlines()[-1] == "stopped"
    assert "Traceback" not in log.read_text()
    assert [path.name for path in temporary.iterdir()] == ["secret"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "temporary"]


class Page:
    """What a visitor sees and does."""

    def __init__(self, driver):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.driver, self.css, self.keys = driver, By.CSS_SELECTOR, Keys

    def one(self, selector):
        return self.driver.find_element(self.css, selector)

    def all(self, selector):
        return self.driver.find_elements(self.css, selector)

    def state(self):
        return self.one(".results").get_attribute("data-state")

    def sources(self):
        """The pictures: image, map, overlay, and those beside it."""
        return [image.get_attribute("src") for image in self.all(".results figure img")]

    def chips(self):
        return " | ".join(self.one(".headline").text.splitlines())

    def after(self, act, what, changed=2):
        """Do something, wait until the page is done with it, and expect another overlay (or another picture)."""
        before = self.sources()
        act()
        seen: list[str] = []

        def done():
            seen[:] = self.sources()
            whole = len(seen) == len(before)  # a page that is drawn again has fewer pictures for a moment
            return self.state() == "done" and whole and seen[changed] != before[changed]

        until(done, what)
        return seen


@GRADIO
def test_the_page_in_a_browser(browser, server, tmp_path):
    _, address, temporary, log = server
    browser.get(address)
    page = Page(browser)
    until(lambda: page.state() == "done", "the first picture")
    first = page.sources()
    assert len(first) == len(set(first)) == 6
    assert page.chips().startswith("model swin-mini trained weights | predicted ")

    page.after(lambda: page.all("#samples button.thumbnail-item")[2].click(), "another sample", changed=0)
    best = page.chips().partition("explained ")[2]

    # Another class, by a click on a prediction, then from the menu.
    begin = page.sources()
    then = page.after(lambda: page.all("#top button")[1].click(), "the second prediction")
    assert page.chips().partition("explained ")[2] != best
    assert then[0] == begin[0]  # the image is the same
    assert then[3] == begin[3]  # attention rollout explains no class

    def choose_class():
        page.one("#target input").click()
        until(lambda: page.all("ul[role=listbox] li"), "the menu of classes")[3].click()

    page.after(choose_class, "a class of the menu")

    # What is typed into a menu looks for it, in the place of what was chosen. A second class is beside the first.
    def search(menu, text):
        box = page.one(f"#{menu} input")
        box.click()
        until(lambda: box.get_property("selectionStart") == 0 < box.get_property("selectionEnd"), "it is marked")
        box.send_keys(text)
        until(lambda: [each.text.split(" (")[0] for each in page.all("ul[role=listbox] li")] == ["ankle boot"], text)
        box.send_keys(page.keys.ENTER)

    search("other", "ankl")
    until(lambda: page.state() == "done" and len(page.sources()) == 9, "two classes")
    assert "Two classes, one scale" in page.one(".results").text
    search("target", "BOOT")
    until(lambda: page.state() == "done" and len(page.sources()) == 6, "one class twice is one class")
    assert "explained ankle boot" in page.chips()
    groups = [(each.get_attribute("role"), each.get_attribute("aria-label")) for each in page.all("fieldset")]
    assert {("radiogroup", "Rule"), ("group", "beside")} <= set(groups)

    by_rule = page.after(lambda: page.all("#rule label")[1].click(), "another rule")
    assert by_rule[3:] != by_rule[:3]
    assert "evidence: overlay" in page.one(".results").text
    page.after(lambda: page.one("#depth input[type=range]").send_keys(page.keys.ARROW_RIGHT), "another depth")
    assert "read after block 1" in page.one(".results").text

    # An upload, wide, so that it is not a sample.
    photo = tmp_path / "own.png"
    zoo.scenes()[100].image.resize((200, 120)).save(photo)

    def upload():
        page.one("#image .top-panel button").click()
        until(lambda: page.state() == "idle", "the image is taken away")
        page.one("#image input[type=file]").send_keys(str(photo))

    # What is no image leaves nothing of it, and a message.
    photo.write_bytes(photo.read_bytes()[:2000])
    upload()
    until(lambda: "cannot be read as an image" in page.one(".toast-body").text, "the message")
    assert page.state() == "idle"
    assert page.all("#image img") == []
    zoo.scenes()[100].image.resize((200, 120)).save(photo)
    page.one("#image input[type=file]").send_keys(str(photo))
    until(lambda: page.state() == "done", "the upload")

    before = page.sources()[0]
    zoo.scenes()[101].image.resize((200, 120)).save(photo)
    upload()
    until(lambda: page.state() == "done" and page.sources()[0] != before, "the upload")
    (folder,) = temporary.glob("captum-lnstat-demo-*")
    assert {path.name for path in folder.rglob("own.png")} == {"own.png"}

    # A model that is not there is a message.
    box = page.one("#model input")
    box.click()
    box.send_keys(page.keys.CONTROL, "a")
    box.send_keys("no_such_model", page.keys.ENTER)
    until(lambda: page.state() == "failed", "the message")
    assert "unknown model 'no_such_model'" in page.one(".failure").text

    # At the width of a telephone nothing sticks out.
    browser.set_window_size(500, 1000)
    until(lambda: browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "narrow")
    tops = [page.one(selector).location["y"] for selector in ("#image", "#samples", "#results", "#model", "#target")]
    assert tops == sorted(tops)  # the picture before the controls

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    elsewhere = [url for url in urls if not url.startswith((address, "data:", "blob:", "chrome:", "chrome-"))]
    assert sum(url.startswith(address) for url in urls) > 20
    assert elsewhere == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert "Traceback" not in log.read_text()
