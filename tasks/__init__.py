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

import ast
import gzip
import json
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import data
from training.config import BadInput

SYSTEM = "You write Python code. {}Think first, then answer."
OBEY = "Follow the update notes you are given, even where they contradict what you remember of a library. "
NOTE = """\
{package} was updated. The update notes say:
<doc>
{description}

{signature}

{docstring}
</doc>
"""
ARENA = """\
{scenario}

{problem}

Use {package}. The solution begins with
```python
{solution_signature}
```
and has to pass this test, among others:
```python
{test}
```
"""
COMPLETE = "Complete this function:\n```python\n{prompt}\n```\n"
REQUEST = "Reason inside <think> </think>, then give the complete code inside <answer> </answer>, in a ```python fence."


@dataclass(frozen=True)
class Problem:
    """One problem. A migration task has a name, a package and its example, the others all but the example."""

    name: str
    package: str = ""
    update_type: str = ""
    note: str = ""  # of the update; --no-update leaves it out of the prompt
    question: str = ""
    reference: str = ""
    setup: str = ""  # runs before the answer's code
    update: str = ""  # runs between the two: the statement that puts the new function into its library
    tests: tuple = ()
    entry_point: str | None = None  # the function that check() of HumanEval's tests is given
    example: data.Example | None = None


TASKS = ("migration", "codeupdatearena", "humaneval", "humaneval+")
SOURCES = {"codeupdatearena": "leo-liuzy/CodeUpdateArena", "humaneval+": "evalplus/humanevalplus"}  # unless --data
HUB_FILES = {"leo-liuzy/CodeUpdateArena": "arena-ungrouped.jsonl", "evalplus/humanevalplus": "test.jsonl"}


def locate(source):
    """The local path of `source`: the path itself, or the hub's file, downloaded once and cached."""
    if Path(source).is_file():
        return Path(source)
    if source not in HUB_FILES:
        raise BadInput(f"data: no file {source!r}; give a JSONL file (.gz too) or a hub id: {', '.join(HUB_FILES)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(source, HUB_FILES[source], repo_type="dataset"))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"data: cannot fetch {source!r} from the hub ({reason}); give a local JSONL file")


def read_rows(source):
    """Yield (where, row) for every line of a JSONL file, gzipped or not; `where` names file and line."""
    path = locate(source)
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{path}: cannot be unpacked ({error}); download it again")
    yield from data.json_rows(path, content)


def broken(where, field, why):
    return BadInput(f"{where}: field {field!r} {why}; mend the row or take it out")


def texts(where, row, names):
    """The values of the fields `names`, separated by blanks; each must be text."""
    for name in names.split():
        value = row.get(name)
        if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
            raise broken(where, name, "is not text" if name in row else "is missing")
    return [row[name] for name in names.split()]


def functions(where, row, field, prefix=""):
    """[(name, source)] of the top-level functions in a field whose names begin with `prefix`.

    What else stands there, imports say, is put in front of each. Parted by Python's own parser, for
    blank lines also occur within a function.
    """
    (code,) = texts(where, row, field)
    try:
        with warnings.catch_warnings(action="ignore"):  # an odd escape in their strings is not our news
            nodes, lines = ast.parse(code).body, code.split("\n")
    except (SyntaxError, ValueError) as error:
        raise broken(where, field, f"does not parse ({error})")
    first = lambda node: min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
    source = lambda node: "\n".join(lines[first(node) - 1 : node.end_lineno])
    wanted = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith(prefix)]
    if not wanted:
        raise broken(where, field, f"defines no function {prefix}".rstrip())
    shared = "".join(source(node) + "\n" for node in nodes if node not in wanted)
    return [(node.name, shared + source(node)) for node in wanted]


def update_statement(where, update):
    """The statement that puts the new function into its library; how, the kind of update tells."""
    path, kind = texts(where, update, "function_path update_type")
    parent, name = path.rpartition(".")[0], functions(where, update, "implementation")[-1][0]
    action, place, aspect = [*kind.split("-"), "", "", ""][:3]
    if not parent:
        raise broken(where, "function_path", f"{path!r} names no library")
    if place in ("argument", "output") or (action, aspect) == ("add", "semantics"):
        return f"{path} = {name}"
    if place == "function" and (action, aspect) in (("modify", "name"), ("add", "")):
        return ("" if action == "add" else f"del {path}\n") + f"setattr({parent}, {name!r}, {name})"
    raise broken(where, "update_type", f"{kind!r} has no rule")


def load_arena(source):
    """CodeUpdateArena. Tests that use a name which only the reference imports, mostly np, stay as they are."""
    found = []
    for where, row in read_rows(source):
        update, examples = row.get("update", row), row.get("prog_syn_examples", [row])
        if not isinstance(update, dict):
            raise broken(where, "update", "is not an object")
        if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
            raise broken(where, "prog_syn_examples", "is not a list of objects")
        package, kind, *_ = texts(where, update, "package update_type description signature docstring")
        statement = update_statement(where, update)
        for example in examples:
            imports = "prog_syn_imports" if "prog_syn_imports" in example else "imports"
            shown = "scenario problem solution_signature"
            name, imports, reference, *_ = texts(where, example, f"prog_syn_id {imports} ref_solution {shown}")
            tests = tuple(test for _, test in functions(where, example, "unit_tests", "test"))
            words = {**example, **update, "test": tests[0]}
            note, question = NOTE.format_map(words), ARENA.format_map(words)
            setup = f"{imports}\n{update['implementation']}\n"
            found.append(Problem(name, package, kind, note, question, reference, setup, statement, tests))
    return found


PLUS = """
import copy, json
inputs, atol, space = json.loads({inputs!r}), {atol!r} or 1e-6, {{}}
exec({reference!r}, space)

def close(a, b):
    if isinstance(b, float) and isinstance(a, (int, float)):
        return a == b or abs(a - b) <= atol + 1e-7 * abs(b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(close, a, b))
    return a == b

def check(candidate):
    for args in inputs:
        value = candidate(*copy.deepcopy(args))
        if {entry!r} == "find_zero":  # any root will do
            assert abs(sum(c * value**i for i, c in enumerate(args[0]))) <= atol, args
        else:
            assert close(value, space[{entry!r}](*copy.deepcopy(args))), args
"""


def load_humaneval(source):
    """HumanEval and HumanEval+: an answer is a whole function and runs behind the prompt, so its imports hold."""
    found = []
    for where, row in read_rows(source):
        name, prompt, entry, body = texts(where, row, "task_id prompt entry_point canonical_solution")
        if isinstance(row.get("base_input"), list) and isinstance(row.get("plus_input"), list):
            inputs, atol = json.dumps(row["base_input"] + row["plus_input"]), row.get("atol", 0)
            test = PLUS.format(inputs=inputs, atol=atol, reference=prompt + body, entry=entry)
        else:
            (test,) = texts(where, row, "test")
        code = {"question": COMPLETE.format(prompt=prompt.strip("\n")), "reference": prompt + body, "setup": prompt}
        found.append(Problem(name, **code, tests=(test,), entry_point=entry))
    return found


def load(task, source):
    """The problems of a task, list[Problem], all with different names. BadInput names the line that is wrong."""
    if task == "migration":
        return [Problem(str(i), e.dependency, example=e) for i, e in enumerate(data.load_examples(source))]
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
