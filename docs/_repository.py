"""The address of the repository that the documentation is built from, for a link to it."""

import subprocess
from pathlib import Path
from urllib.parse import urlsplit


def address(folder: Path) -> str | None:
    """Where the clone in ``folder`` came from, if that is on the web; without a user's name or token."""
    asked = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None  # an archive, on a machine without git
    parts = urlsplit(found)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    host = parts.hostname + (f":{parts.port}" if parts.port else "")
    return f"https://{host}{parts.path.removesuffix('.git')}"
