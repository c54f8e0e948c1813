"""What a run has found so far, on disk: complete lines only, whoever wrote them and however the run ended."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captum_lnstat.visualize.writing import write_whole

Record = dict[str, Any]


class ResumeError(ValueError):
    """The folder holds a run of other settings; the message says which."""


class Records:
    """Append-only files of one JSON object a line, one file a process, read together.

    A record is a line that ends. A process that is killed leaves at most one torn line at the end of its file; it is
    left out, and its image is done again. Which process wrote a record does not matter: records are told apart by
    ``index``, and the first of an index counts.

    Args:
        folder: Where the files are; made if it is not there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     records = Records(Path(name))
        ...     records.append([{"index": 1}, {"index": 0}])
        ...     (file,) = Path(name).glob("*.jsonl")
        ...     _ = file.write_bytes(file.read_bytes() + b'{"index": 2')
        ...     [record["index"] for record in records.read()]
        [0, 1]
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{uuid.uuid4().hex}.jsonl"

    def append(self, records: Sequence[Record]) -> None:
        """Write records so that they survive the process: one write, then flushed to the disk."""
        if not records:
            return
        data = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> list[Record]:
        """All records, by index.

        Raises:
            ResumeError: A complete line is damaged; the message names the file and the line.
        """
        found: dict[int, Record] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for record in _lines(path):
                found.setdefault(record["index"], record)
        return [found[index] for index in sorted(found)]


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("index"), int):
                raise ValueError("no index")
        except ValueError as error:
            raise ResumeError(
                f"line {number} of {str(path)!r} is damaged: {error}; delete the line, and its images are done again"
            ) from None
        yield record


def check_manifest(folder: Path, settings: dict[str, Any], write: bool) -> bool:
    """Whether the folder holds a run of these settings to go on with; a new one gets the settings written down.

    Args:
        folder: The run's folder.
        settings: Plain values for JSON, all on which a number depends.
        write: Write the settings if there are none.

    Raises:
        ResumeError: The folder holds a run of other settings, or something else.
    """
    path = folder / "manifest.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ResumeError(f"{str(folder)!r} is not empty and holds no run; expected a new folder, or that of a run")
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(settings, indent=2) + "\n")
        return False
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ResumeError(f"{str(path)!r} cannot be read: {error}; take another folder") from None
    other = [
        f"{key} was {_short(found.get(key))} and is {_short(settings.get(key))}"
        for key in {**found, **settings}
        if found.get(key) != settings.get(key)
    ]
    if other:
        raise ResumeError(
            f"{str(folder)!r} holds a run of other settings: {'; '.join(other)}. Take another folder, or the same "
            "settings to go on with it"
        )
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step, or leave it as it was."""
    write_whole(path, lambda file: file.write(data))
