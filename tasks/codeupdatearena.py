"""CodeUpdateArena: solve a problem with a function that was just changed (arXiv 2407.06249)."""

import ast
import warnings

from tasks.problem import Problem, broken, read_rows, texts

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
