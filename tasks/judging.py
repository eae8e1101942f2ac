"""What eval.py needs around the verdicts: the log, the sandbox, the references."""

import contextlib
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lib import parallel
from lib.config import BadInput, read_settings
from lib.files import write
from training import screen

MAY_CHANGE = ("output", "k", "batch", "unsafe", "references", "compare")  # no sample depends on it
JUDGES = max(1, os.cpu_count() // parallel.LOCAL_WORLD)  # answers that are judged at once


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


def open_sandbox(problems, unsafe):
    """The sandbox for answers to these problems, with their libraries loaded."""
    import sandbox  # Linux only

    code = "\n".join(text for p in problems for text in (p.setup, p.reference, *p.tests))
    libraries = sorted(set(re.findall(r"^\s*(?:import|from) +([\w.]+)", code, re.MULTILINE)))
    memory = (4 if problems[0].entry_point is None else 1) << 30  # some have large arrays
    try:
        box = sandbox.Sandbox(libraries, workers=JUDGES, unsafe=unsafe, memory=memory)
        box.run("", ["def test_nothing(): pass"])  # fail now, not after hours of sampling
    except sandbox.Unavailable as error:
        raise BadInput(str(error))
    return box


def references(problems, box):
    """Judge the reference solutions, which must pass, and the controls, which must not.

    Returns 0 if no control passes and at least 95 % of the references do: another version of a
    library or a small memory spoils a few.
    """
    passed = leaked = 0
    with ThreadPoolExecutor(JUDGES) as pool:
        right = pool.map(lambda p: p.run(box, p.reference), problems)
        wrong = pool.map(lambda p: p.run(box, p.control, updated=False), problems)
        each = screen.progress([[problem] for problem in problems], "references")
        for [problem], good, bad in zip(each, right, wrong):
            passed += good.passed
            leaked += bad.passed
            if not good.passed:
                tqdm.write(f"{problem.name}: {good.status} {good.reason}")
            if bad.passed:
                tqdm.write(f"{problem.name}: its control passes")
    print(f"references: {passed} of {len(problems)} pass, {leaked} of the controls")
    return int(leaked > 0 or passed < 0.95 * len(problems))
