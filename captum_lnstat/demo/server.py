"""Serves the page: on the loopback address unless told otherwise, and with nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from captum_lnstat.demo.guard import Guard
from captum_lnstat.demo.photo import MAX_BYTES
from captum_lnstat.explanation.subject.subject import Subject

LOOPBACK = ("127.0.0.1", "localhost")
_SESSIONS = 16  # visitors whose image is kept at a time


def free_port(host: str, port: int = 0) -> int:
    """The port if nothing listens on it, or any such port for 0.

    Raises:
        OSError: It is taken, or the address is not one of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def serve(host: str, port: int, ready: Callable[[str], None], own: Subject | None = None) -> None:
    """Serve the page until the process is told to stop (Ctrl-C or SIGTERM).

    All that is written while it runs, uploads included, lies in one temporary folder, which is removed at the end.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.
        ready: Called with the page's address once it is there.
        own: A model to begin with.

    Raises:
        OSError: The port cannot be listened on.
    """
    port = free_port(host, port)
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        with tempfile.TemporaryDirectory(prefix="captum-lnstat-demo-") as folder:
            page = _launch(host, port, Path(folder), own)
            try:
                ready(page.local_url)
                while not stop.wait(3600):
                    pass
            except KeyboardInterrupt:
                pass
            finally:
                page.close(verbose=False)
    finally:
        signal.signal(signal.SIGTERM, before)


def _launch(host: str, port: int, folder: Path, own: Subject | None) -> Any:
    _settle(host, folder)
    from starlette.middleware import Middleware

    from captum_lnstat.demo.app import build, style
    from captum_lnstat.demo.studio import Studio

    hosts = LOOPBACK if host in LOOPBACK else None
    guard = Middleware(Guard, folder=folder, hosts=hosts, max_upload=MAX_BYTES)
    page = build(Studio(own), folder)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        run_history=False,
        footer_links=[],
        allowed_paths=[],
        blocked_paths=[],
        max_file_size=MAX_BYTES,
        state_session_capacity=_SESSIONS,
        app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
        **style(),
    )
    return page


def _settle(host: str, folder: Path) -> None:
    """What Gradio would take from the environment, or leave in it, before it is imported."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Half-written uploads go through the ordinary temporary folder.
    tempfile.tempdir = str(folder)
    # Gradio asks itself whether it is there; that request must not leave through a proxy.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK, host)))
