"""The sandbox for the answers of a benchmark, and the check that it judges the references right."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from lib import parallel
from lib.config import BadInput
from training import screen

JUDGES = max(1, os.cpu_count() // parallel.LOCAL_WORLD)  # answers that are judged at once


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
