"""Files: JSONL from here or the hub, atomic writes, logs, locks."""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub import logging as hub_logging

from lib.config import BadInput, first_line

hub_logging.set_verbosity_error()  # BadInput reports the last of the retries
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/Name


def fetch(hub_id, name):
    """The local path of file `name` of a data set on the hub, downloaded once and cached."""
    try:
        return Path(hf_hub_download(hub_id, name, repo_type="dataset"))
    except OSError as error:  # no network, no such data set, no such file in it
        why = f"cannot fetch {name} of {hub_id!r} from the hub ({first_line(error)})"
        raise BadInput(f"data: {why}; give a local JSONL file")


def locate(source):
    """The local path of a data set: `source` itself, or the file of that hub id."""
    path = Path(source)
    if path.is_file():
        return path
    if path.exists() or not HUB_ID.fullmatch(source) or path.suffix in (".json", ".jsonl"):
        raise BadInput(f"data: no file {source!r}; give a JSONL file or a hub id (owner/Name)")
    return fetch(source, source.split("/")[1].lower() + ".jsonl")


def unix_lines(text):
    """`text` with line ends as in a model's answers, "\\n", and without a byte order mark."""
    return re.sub("\r\n?", "\n", text.removeprefix("\ufeff"))


def json_rows(path, content):
    """Yield ("PATH, line N", JSON object) for every line of `content`, bytes, that is not blank."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise BadInput(f"{where}: not JSON ({error}); each line must be one JSON object")
        if not isinstance(row, dict):
            raise BadInput(f"{where}: not a JSON object but {type(row).__name__}")
        yield where, row


def write(path, content):
    """Replace a file atomically: write beside it, sync, rename. Makes the directory if needed.

    content: bytes, or a function that writes to an open binary file. Raises BadInput.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = getattr(error, "strerror", None) or "torch.save failed, as on a full disk"
        raise BadInput(f"cannot write {path}: {reason}; the old file is unchanged")


def lock(directory):
    """Lock a run directory until the returned file is closed; BadInput names who holds it."""
    import fcntl  # not on Windows

    file = open(directory / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise BadInput(f"--output {directory} is in use by process {file.read()}; wait or stop it")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def read_bytes(name):
    """The content of a file, or of stdin for "-"."""
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise BadInput(f"{name}: cannot be read: {error.strerror}")


def read_text(name):
    """The exact text of a UTF-8 file, or of stdin for "-"."""
    try:
        return read_bytes(name).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not UTF-8 at byte {error.start}; save it as UTF-8 first")
