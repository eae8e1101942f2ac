"""The benchmarks, a file for each: what the model is asked, and when its answer is right.

problem.py has what those with tests share, judging.py and table.py are for eval.py.
"""

import gzip
import zlib
from collections import Counter
from pathlib import Path

from lib.config import BadInput, first_line
from lib.files import fetch, json_rows
from lib.sources import BROKEN
from tasks import codeupdatearena, humaneval, migration, numpy2

TASKS = {  # how a row is read
    "migration": None,
    "codeupdatearena": codeupdatearena.read,
    "humaneval": humaneval.read,
    "humaneval+": humaneval.read,
    "numpy2": numpy2.read,
}
ARENA = "leo-liuzy/CodeUpdateArena"
PLUS = "evalplus/humanevalplus"
SOURCES = {"codeupdatearena": ARENA, "humaneval+": PLUS, "numpy2": numpy2.ROWS}
HUB_FILES = {ARENA: "arena-ungrouped.jsonl", PLUS: "test.jsonl"}


def load(task, source, no_update=False, plain=False):
    """The problems of a JSONL file (.gz too) or hub id, list. BadInput names the file and line.

    no_update leaves the update notes out; plain asks HumanEval in the plain form.
    """
    if task == "migration":
        return list(migration.load(source, no_update))
    path = fetch(source, HUB_FILES[source]) if source in HUB_FILES else Path(source)
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"data: cannot read {source!r} ({error}); give a JSONL file")
    problems = []
    for where, row in json_rows(path, content):
        try:
            problems += TASKS[task](row, no_update, plain)
        except (TypeError, KeyError, *BROKEN) as error:
            raise BadInput(f"{where}: {first_line(error)}; fix the row or remove it")
    if not problems:
        raise BadInput(f"data: no problem in {source!r}: the file is empty")
    name, count = Counter(problem.name for problem in problems).most_common(1)[0]
    if count > 1:
        raise BadInput(f"data: {count} problems of {source!r} are called {name!r}; keep one")
    return problems
