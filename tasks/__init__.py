"""The benchmarks, a file for each: what the model is asked, and when its answer is right.

    migration        rewrite old code as an update note says: the records of data.py
    codeupdatearena  solve a problem with a function that was just changed
    humaneval        complete a function; humaneval+ adds far more tests
    numpy2           rewrite a program that NumPy 2 broke; it is run

problem.py holds what the last three share. For eval.py, judging.py opens the sandbox, log.py reads
what is done already, and table.py makes the table.

    python -c "import tasks; print(tasks.load('humaneval', 'HumanEval.jsonl.gz')[0])"
"""

from collections import Counter

from lib.config import BadInput
from tasks import codeupdatearena, humaneval, migration, numpy2

TASKS = ("migration", "codeupdatearena", "humaneval", "humaneval+", "numpy2")
SOURCES = {
    "codeupdatearena": codeupdatearena.HUB_ID,
    "humaneval+": humaneval.HUB_ID,
    "numpy2": numpy2.ROWS,
}


def load(task, source, no_update=False, plain=False):
    """The problems of a JSONL file (.gz too) or hub id, list. BadInput names the file and line.

    no_update leaves the update notes out; plain asks HumanEval in the plain form.
    """
    if task == "migration":
        return migration.load(source, no_update)
    if task == "codeupdatearena":
        problems = codeupdatearena.load(source, no_update)
    elif task == "numpy2":
        problems = numpy2.load(source, no_update)
    else:
        problems = humaneval.load(source, plain)
    if not problems:
        raise BadInput(f"data: no problem in {source!r}: the file is empty")
    name, count = Counter(problem.name for problem in problems).most_common(1)[0]
    if count > 1:
        raise BadInput(f"data: {count} problems of {source!r} are called {name!r}; keep one")
    return problems
