"""Files that are replaced atomically or appended to line by line, and the lock of a directory."""

import contextlib
import json
import os

from training.config import BadInput


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
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = getattr(error, "strerror", None)
        reason = reason if reason else "torch.save failed, as it does on a full disk"
        raise BadInput(f"cannot write {path}: {reason}; what was there is unharmed")


def append(path, rows, way_out):
    """Append JSON objects to a .jsonl file. Raises BadInput, which ends with the `way_out`."""
    try:
        with open(path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; make room, then {way_out}")


LOCKS = {}  # real path -> open lock file; the kernel releases it when the process ends


def lock(directory):
    """Keep other processes out of a run directory; BadInput names the process that holds it."""
    import fcntl  # not on Windows

    unlock(directory)  # an earlier run of this process
    path = directory / "lock"
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise BadInput(f"--output {directory} is in use by process {file.read()}; wait or stop it")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    LOCKS[path.resolve()] = file


def unlock(directory):
    """Let other processes use a run directory that this one has locked."""
    held = LOCKS.pop((directory / "lock").resolve(), None)
    if held:
        held.close()
