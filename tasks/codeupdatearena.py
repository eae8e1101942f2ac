"""CodeUpdateArena: solve a problem with a function that was just changed (arXiv 2407.06249).

An answer is right when it passes all unit tests with the update. It is "updated" when it also
fails without the statement that puts the new function into its library. An answer is run behind the
reference's imports: signatures use typing's List or Tuple, and some tests use np.

All releases are read: {update: {}, prog_syn_examples: [{}]}, {update: {}, imports}, flat rows.
"""

import ast

from lib.sources import parse
from tasks.problem import Problem, check_texts

FIELDS = """
package update_type description signature docstring imports implementation function_path
prog_syn_id scenario problem solution_signature unit_tests ref_solution
""".split()
NOTE = """\
{package} was updated. The update notes say:
<doc>
{description}

{signature}

{docstring}
</doc>
"""
QUESTION = """\
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


def split_functions(code, prefix=""):
    """[(name, source)] of the top-level functions whose names begin with `prefix`; ValueError if 0.

    All other code, e.g. imports, is put in front of each.
    """
    lines = code.split("\n")
    shared = ""
    found = []
    for node in parse(code).body:
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", [])))
        source = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef) and node.name.startswith(prefix):
            found.append((node.name, source))
        else:
            shared += source + "\n"
    if not found:
        raise ValueError(f"no function {prefix}* in {code!r:.40}")
    return [(name, shared + source) for name, source in found]


def update_statement(path, kind, name):
    """The statement that puts a new function into its library; the kind of update tells how."""
    parent = path.rpartition(".")[0]
    if not parent:
        raise ValueError(f"function_path {path!r} names no library")
    place = kind.partition("-")[2]  # kind: action-place or action-place-aspect
    if place.startswith(("argument", "output")) or kind == "add-function-semantics":
        return f"{path} = {name}"
    if kind == "add-function":
        return f"setattr({parent}, {name!r}, {name})"
    if kind == "modify-function-name":
        return f"del {path}\nsetattr({parent}, {name!r}, {name})"
    raise ValueError(f"update_type {kind!r} has no rule")


def read(row, no_update=False, plain=False):
    """The problems of a row of any schema."""
    for example in row.get("prog_syn_examples", [row]):
        flat = {**row.get("update", {}), **example}
        flat["imports"] = flat.get("prog_syn_imports", flat.get("imports"))
        check_texts(flat, FIELDS)
        tests = [test for _, test in split_functions(flat["unit_tests"], "test")]
        nodes = parse(flat["ref_solution"]).body
        known = [ast.unparse(x) for x in nodes if isinstance(x, ast.Import | ast.ImportFrom)]
        name, _ = split_functions(flat["implementation"])[-1]
        yield Problem(
            name=flat["prog_syn_id"], package=flat["package"], update_type=flat["update_type"],
            note="" if no_update else NOTE.format_map(flat),
            question=QUESTION.format_map(flat | {"test": tests[0]}),
            reference=flat["ref_solution"], control=flat["ref_solution"],
            setup="\n".join([flat["imports"], *known, flat["implementation"], ""]),
            update=update_statement(flat["function_path"], flat["update_type"], name),
            tests=tuple(tests),
        )  # fmt: skip
