"""Files that are whole or as they were."""

import contextlib
import os

from training.config import BadInput


def write(path, content):
    """Write bytes so that `path` holds either all of them or what it held before, whatever happens.

    `content` may also be a function that writes to an open file.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's word for a full disk
        with contextlib.suppress(OSError):
            aside.unlink()
        why = getattr(error, "strerror", None) or "torch.save failed, as it does on a full disk"
        raise BadInput(f"cannot write {path}: {why}; nothing that was there is harmed")
