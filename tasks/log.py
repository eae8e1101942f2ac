"""The log of an evaluation, samples.jsonl, from which the same command continues after a kill."""

import contextlib
import hashlib
import json
from pathlib import Path

from lib import parallel
from lib.config import BadInput, read_settings
from lib.files import write

MAY_CHANGE = ("output", "k", "batch", "unsafe", "references", "compare")  # no sample depends on it


def claim(directory, args):
    """Start in `directory`, or continue there if all that determines the samples is unchanged."""
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    for name in ("model", "adapter", "data"):  # the files behind a name may change
        path = Path(settings[name] or "none")
        digest = hashlib.sha256()
        for file in sorted([path, *path.glob("*")]):
            if file.is_file():
                large = file.stat().st_size > 100_000_000  # weights: their time has to do
                digest.update(str(file.stat().st_mtime_ns).encode() if large else file.read_bytes())
        settings[f"files of {name}"] = digest.hexdigest()
    if any(directory.glob("samples*.jsonl")):
        before = read_settings(directory / "config.json")
        for name, value in settings.items():
            if before.get(name) != value:
                change = f"{name} was {before.get(name)!r} in {directory}, now {value!r}"
                raise BadInput(f"--output: {change}; give another, or delete that directory")
    elif parallel.RANK == 0:
        write(directory / "config.json", json.dumps(settings, indent=2).encode())


def read_log(directory):
    """{(problem, sample): row} of all ranks; skips a row that a kill cut short."""
    rows = {}
    for path in directory.glob("samples*.jsonl"):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows[row["problem"], row["sample"]] = row
    return rows
