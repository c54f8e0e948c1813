"""A headless Chromium that tests open pages in, and waiting with a bound."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 180  # seconds; all of it together takes ten on a machine that does nothing else
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,1300"
)


def until(condition, what):
    """The first value of ``condition`` that counts as true; the page redraws itself meanwhile."""
    end, last = time.monotonic() + PATIENCE, None
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except Exception as error:  # an element that was just replaced
            last = error
        time.sleep(0.1)
    raise AssertionError(f"{what}: not after {PATIENCE} s ({last})")


def chromium(profile: Path) -> Any:
    """A Chromium that looks up no name, so that a page which asks another host is found out; else a skip."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium or chromedriver is not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*_FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    return driver
