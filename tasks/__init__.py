"""The benchmarks, a file for each: what the model is asked, and when its answer is right.

    migration        rewrite old code as an update note says: the records of data.py
    codeupdatearena  solve a problem with a function that was just changed
    humaneval        complete a function; humaneval+ adds far more tests
    numpy2           rewrite a program that NumPy 2 broke; it is run

problem.py has what the last three share, judging.py and table.py are for eval.py.

    python -c "import tasks; print(tasks.load('humaneval', 'HumanEval.jsonl.gz')[0])"
"""

from collections import Counter
from functools import partial

from lib.config import BadInput
from tasks import codeupdatearena, humaneval, migration, numpy2
from tasks.problem import read_problems

TASKS = ("migration", "codeupdatearena", "humaneval", "humaneval+", "numpy2")
SOURCES = {
    "codeupdatearena": "leo-liuzy/CodeUpdateArena",
    "humaneval+": "evalplus/humanevalplus",
    "numpy2": numpy2.ROWS,
}


def load(task, source, no_update=False, plain=False):
    """The problems of a JSONL file (.gz too) or hub id, list. BadInput names the file and line.

    no_update leaves the update notes out; plain asks HumanEval in the plain form.
    """
    if task == "migration":
        return list(migration.load(source, no_update))
    if task == "codeupdatearena":
        read = partial(codeupdatearena.read, no_update=no_update)
    elif task == "numpy2":
        read = partial(numpy2.read, no_update=no_update)
    else:
        read = partial(humaneval.read, plain=plain)
    problems = list(read_problems(source, read))
    if not problems:
        raise BadInput(f"data: no problem in {source!r}: the file is empty")
    name, count = Counter(problem.name for problem in problems).most_common(1)[0]
    if count > 1:
        raise BadInput(f"data: {count} problems of {source!r} are called {name!r}; keep one")
    return problems
