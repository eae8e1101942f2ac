"""The problems of an evaluation: what the model is told, and what its answer has to pass.

    migration        rewrite old code as an update note says: the records of data.py
    codeupdatearena  solve a problem with a function that was just changed (arXiv 2407.06249)
    humaneval        write a function (arXiv 2107.03374)
    humaneval+       the same functions, far more tests (arXiv 2305.01210)

A source is a JSONL file, gzipped or not, or a hub id. Accepted rows:

    codeupdatearena  {update: {...}, prog_syn_examples: [{..., prog_syn_imports}]}, {update: {...}, imports, ...},
                     or all fields side by side with prog_syn_imports: three releases have three schemas
    humaneval        task_id, prompt, entry_point, canonical_solution, test
    humaneval+       the same (the hub's file), or base_input, plus_input and atol in place of test (evalplus's
                     own): there the reference gives the expected values, and floats may differ by atol, or 1e-6

    python -c "import tasks; print(tasks.load('humaneval', 'HumanEval.jsonl.gz')[0])"
"""

from collections import Counter
from dataclasses import replace

import data
from tasks.codeupdatearena import load_arena
from tasks.humaneval import load_humaneval
from tasks.migration import load_migration
from tasks.problem import OBEY, REQUEST, SYSTEM, Problem  # noqa: F401
from training.config import BadInput

TASKS = ("migration", "codeupdatearena", "humaneval", "humaneval+")
SOURCES = {"codeupdatearena": "leo-liuzy/CodeUpdateArena", "humaneval+": "evalplus/humanevalplus"}  # unless --data


def load(task, source):
    """The problems of a task, list[Problem], all with different names. BadInput names the line that is wrong."""
    if task == "migration":
        return load_migration(source)
    found = load_arena(source) if task == "codeupdatearena" else load_humaneval(source)
    if not found:
        raise BadInput(f"data: no problem in {source!r}: the file is empty")
    name, count = Counter(problem.name for problem in found).most_common(1)[0]
    if count > 1:
        raise BadInput(f"data: {count} problems of {source!r} are called {name!r}; keep one of them")
    return found


def encode(problem, tokenizer, no_update=False):
    """The prompt's token ids: the request of training, the tokenizer's chat template, the turn left open."""
    if problem.example:  # without its note, the doc element stays and is empty
        return data.encode_prompt(replace(problem.example, update_info="") if no_update else problem.example, tokenizer)
    note = "" if no_update else problem.note
    return data.encode_messages(SYSTEM.format(OBEY if note else ""), note + problem.question + REQUEST, tokenizer)
