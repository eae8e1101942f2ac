"""CodeUpdateArena: solve a problem with a function that was just changed (arXiv 2407.06249).

An answer is right when it passes all unit tests with the update. It is "updated" when it also
fails without it, i.e. without the one statement that puts the new function into its library.

An answer is run behind the reference's imports, unlike in the benchmark's own code: half of the
signatures that it asks for use typing's List or Tuple, and some tests use np without importing it.

Rows of all releases are read: {update: {}, prog_syn_examples: [{}]}, {update: {}, imports}, flat.
"""

import ast
import warnings

from tasks.problem import Problem, broken, check_texts, read_rows

HUB_ID = "leo-liuzy/CodeUpdateArena"
FIELDS = """
package update_type description signature docstring implementation function_path
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


def statements(where, row, field):
    """The top-level statements of a field's code, as ast nodes."""
    try:
        with warnings.catch_warnings(action="ignore"):  # odd escapes in their strings
            return ast.parse(row[field]).body
    except (SyntaxError, ValueError) as error:
        raise broken(where, field, f"does not parse ({error})")


def split_functions(where, row, field, prefix=""):
    """[(name, source)] of a field's top-level functions whose names begin with `prefix`.

    All its other code, e.g. imports, is put in front of each. Python's own parser finds the ends:
    blank lines also occur within functions.
    """
    lines = row[field].split("\n")
    shared = ""
    found = []
    for node in statements(where, row, field):
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in (node, *decorators))
        source = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef) and node.name.startswith(prefix):
            found.append((node.name, source))
        else:
            shared += source + "\n"
    if not found:
        raise broken(where, field, f"defines no function {prefix}".rstrip())
    return [(name, shared + source) for name, source in found]


def update_statement(where, row):
    """The statement that puts the new function into its library; the kind of update tells how."""
    path = row["function_path"]
    kind = row["update_type"]  # action-place or action-place-aspect
    name, _ = split_functions(where, row, "implementation")[-1]
    parent = path.rpartition(".")[0]
    if not parent:
        raise broken(where, "function_path", f"{path!r} names no library")
    place = kind.partition("-")[2]
    if place.startswith(("argument", "output")) or kind == "add-function-semantics":
        return f"{path} = {name}"
    if kind == "add-function":
        return f"setattr({parent}, {name!r}, {name})"
    if kind == "modify-function-name":
        return f"del {path}\nsetattr({parent}, {name!r}, {name})"
    raise broken(where, "update_type", f"{kind!r} has no rule")


def flatten(where, row):
    """The problems of a row of any schema, as dicts with all fields at the top level."""
    update = row.get("update", {})
    try:
        return [{**update, **example} for example in row.get("prog_syn_examples", [row])]
    except TypeError:
        raise broken(where, "update", "or 'prog_syn_examples' does not hold objects")


def load(source, no_update=False):
    """The problems of a source, of any schema."""
    problems = []
    for where, line in read_rows(source, HUB_ID, "arena-ungrouped.jsonl"):
        for row in flatten(where, line):
            imports = "prog_syn_imports" if "prog_syn_imports" in row else "imports"
            check_texts(where, row, [imports, *FIELDS])
            tests = [test for _, test in split_functions(where, row, "unit_tests", "test")]
            nodes = statements(where, row, "ref_solution")
            known = [ast.unparse(x) for x in nodes if isinstance(x, ast.Import | ast.ImportFrom)]
            problem = Problem(
                name=row["prog_syn_id"], package=row["package"], update_type=row["update_type"],
                note="" if no_update else NOTE.format_map(row),
                question=QUESTION.format_map(row | {"test": tests[0]}),
                reference=row["ref_solution"], control=row["ref_solution"],
                controls="without the update",
                setup="\n".join([row[imports], *known, row["implementation"], ""]),
                update=update_statement(where, row), tests=tuple(tests),
            )  # fmt: skip
            problems.append(problem)
    return problems
