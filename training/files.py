"""Files that hold either all of their new content or what they held before."""

import contextlib
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
