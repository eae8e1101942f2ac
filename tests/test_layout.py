"""The layout: which module may import which, and how large each part may become.

Every check takes a directory and returns a readable list of violations. It runs on the project,
where the list must be empty, and on made-up trees with one defect each.
"""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

EXCLUDED = ("tests", "bench", "tiny", "runs", "figures")  # not part of the code to read
LAYERS = (  # a module imports from its own layer and those before it
    ("reward", "sandbox", "lib.config", "lib.files", "lib.sources", "lib.pieces"),
    ("data", "lib.fsdp", "lib.parallel"),
    ("dora", "lib.loading", "lib.speed", "naive_grpo"),
    ("recode",),
    ("rollout",),
    ("training",),
    ("grpo", "dapo", "sft", "eval", "migrate", "tasks"),
    ("tools",),
)
INDEPENDENT = ("reward", "sandbox")  # these import none of our modules
PROGRAMS = ("grpo", "dapo", "sft", "eval", "migrate")  # only tools import these
OPTIONAL = ("tensorboard", "torch.utils.tensorboard", "wandb", "peft", "rapidfuzz")
LINUX_ONLY = ("sandbox", "fcntl", "ctypes", "resource")

MAX_FILES = 11  # at the top level
MAX_TOP_LINES = 2400  # in total at the top level
MAX_LINES = 6130  # of all Python but EXCLUDED; the goal is 5800
MAX_FUNCTION = 40  # lines, docstring included
MAX_COLUMNS = 100


# ------------------------------------------------------------------------- reading a tree


def sources(root, excluded=EXCLUDED):
    """{path relative to root: text} of the Python files that count, sorted by path."""
    paths = list(root.glob("*.py"))
    for folder in root.iterdir():
        hidden = folder.name.startswith(".") or (folder / "pyvenv.cfg").exists()
        if folder.is_dir() and not hidden and folder.name not in excluded:
            paths += folder.rglob("*.py")
    return {path.relative_to(root): path.read_text() for path in sorted(paths)}


def module_name(path):
    """training/run.py -> training.run, sandbox/__init__.py -> sandbox."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(node, module, is_package):
    """The dotted names that an import statement may load; `from a import b` gives a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module
    if node.level:  # relative
        parents = module.split(".")
        up = node.level - 1 if is_package else node.level
        parents = parents[: len(parents) - up]
        base = ".".join(parents + [base] if base else parents)
    return [f"{base}.{alias.name}".lstrip(".") for alias in node.names]


def imports(root):
    """Yield (path, module, node, dotted name) of every import, including those in functions."""
    for path, text in sources(root).items():
        module = module_name(path)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in imported(node, module, path.name == "__init__.py"):
                    yield path, module, node, name


def is_under(name, parents):
    """Whether a dotted name is one of `parents` or inside one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def layer(module):
    """The index of a module's layer, or None."""
    for number, names in enumerate(LAYERS):
        if is_under(module, names):
            return number
    return None


def our_imports(root):
    """Yield (where, module, imported module) of every import between our modules."""
    modules = {module_name(path) for path in sources(root)}
    for path, module, node, name in imports(root):
        while name and name not in modules:  # recode.sample is a name in recode
            name = name.rpartition(".")[0]
        if name and name != module:
            yield f"{path}:{node.lineno}", module, name


# ------------------------------------------------------------------------- the checks


def unknown_modules(root):
    """Modules that LAYERS does not name; an empty package __init__ needs no layer."""
    found = []
    for path, text in sources(root).items():
        empty = len(ast.parse(text).body) <= 1
        if layer(module_name(path)) is None and not (path.name == "__init__.py" and empty):
            found.append(f"{path}: in no layer")
    return found


def upward_imports(root):
    found = []
    for where, module, name in our_imports(root):
        own, other = layer(module), layer(name)
        outside = module.split(".")[0] != name.split(".")[0]
        program = is_under(name, PROGRAMS)
        if own is not None and other is not None and other > own:
            found.append(f"{where}: {module} imports {name}, which is in a layer above")
        elif is_under(module, INDEPENDENT) and outside:
            found.append(f"{where}: {module} imports {name}, but should import none of our modules")
        elif program and not is_under(module, ("tools",)):
            found.append(f"{where}: {module} imports the program {name}")
    return found


def import_cycles(root):
    """Import cycles, also within a layer."""
    graph = {}
    for _, module, name in our_imports(root):
        graph.setdefault(module, set()).add(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["cycle: " + " <- ".join(error.args[1])]
    return []


def local_imports(root):
    """Imports inside functions, except optional packages and Linux-only modules."""
    found = []
    for path, text in sources(root).items():
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if not isinstance(node, ast.Import | ast.ImportFrom):
                    continue
                for name in imported(node, module_name(path), path.name == "__init__.py"):
                    if not is_under(name, OPTIONAL + LINUX_ONLY):
                        found.append(f"{path}:{node.lineno}: {function.name} imports {name}")
    return found


def count(text):
    return len(text.splitlines())


def large_top_level(root):
    lines = {path: count(text) for path, text in sources(root).items() if len(path.parts) == 1}
    sizes = ", ".join(f"{path} {number}" for path, number in lines.items())
    found = []
    if len(lines) > MAX_FILES:
        found.append(f"{len(lines)} files at the top level, at most {MAX_FILES}: {sizes}")
    if sum(lines.values()) > MAX_TOP_LINES:
        found.append(
            f"{sum(lines.values())} lines at the top level, at most {MAX_TOP_LINES}: {sizes}"
        )
    return found


def large_project(root):
    lines = {}
    for path, text in sources(root).items():
        folder = path.parts[0] if len(path.parts) > 1 else "top level"
        lines[folder] = lines.get(folder, 0) + count(text)
    if sum(lines.values()) <= MAX_LINES:
        return []
    sizes = ", ".join(f"{folder} {number}" for folder, number in lines.items())
    return [f"{sum(lines.values())} lines, at most {MAX_LINES}: {sizes}"]


def long_functions(root):
    found = []
    for path, text in sources(root).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION:
                    found.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return found


def long_lines(root):
    found = []
    for path, text in sources(root, ("runs", "figures")).items():
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                found.append(f"{path}:{number}: {len(line)} columns")
    return found


def named_lambdas(root):
    found = []
    for path, text in sources(root).items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
                continue
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            if any(isinstance(value, ast.Lambda) for value in values):
                found.append(f"{path}:{node.lineno}: a lambda with a name, use def")
    return found


# ------------------------------------------------------------------------- the project


def assert_none(violations):
    assert not violations, f"{len(violations)} violations:\n" + "\n".join(violations)


def test_every_module_has_a_layer():
    """Stops a new module that no import rule covers."""
    assert_none(unknown_modules(ROOT))


def test_imports_go_downward():
    """Stops a helper that imports a program, and a sandbox that imports the project."""
    assert_none(upward_imports(ROOT))


def test_no_import_cycle():
    """Stops modules that can only be understood, imported or reused together."""
    assert_none(import_cycles(ROOT))


def test_no_import_inside_a_function():
    """Stops an import hidden inside a function, which is how cycles begin."""
    assert_none(local_imports(ROOT))


def test_the_top_level_is_small():
    """Stops a top level that takes longer than an evening to read."""
    assert_none(large_top_level(ROOT))


def test_the_project_is_small():
    """Stops a minimal project from growing unnoticed."""
    assert_none(large_project(ROOT))


def test_functions_are_short():
    """Stops a function that does not fit on a screen."""
    assert_none(long_functions(ROOT))


def test_lines_are_short():
    """Stops a line that does not fit on a slide or in a side-by-side diff."""
    assert_none(long_lines(ROOT))


def test_functions_have_def():
    """Stops a lambda with a name: it has no docstring and no name in a traceback."""
    assert_none(named_lambdas(ROOT))


# ------------------------------------------------------------------------- the checks can fail

TREE = {  # a tree without a defect
    "reward.py": "import ast\n",
    "data.py": "import reward\n",
    "recode.py": "import data\nfrom lib import config, parallel\n",
    "eval.py": "import recode\n\n\ndef main():\n    import sandbox\n    from sandbox import lock\n",
    "sandbox/__init__.py": "from sandbox.lock import lock\n",
    "sandbox/lock.py": "import os\n",
    "lib/__init__.py": '"""What any run needs."""\n',
    "lib/config.py": "import reward\n",
    "lib/parallel.py": "from lib.config import BadInput\n",
    "tools/plan.py": "import eval\nfrom eval import main\n",
    "tests/test_eval.py": "f = lambda: 0\n",
    ".venv/lib/long.py": "#" * 200 + "\n",
}
CHECKS = (
    unknown_modules, upward_imports, import_cycles, local_imports, large_top_level, large_project,
    long_functions, long_lines, named_lambdas,
)  # fmt: skip


def write_tree(directory, files):
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_good_tree_passes(tmp_path):
    """Stops checks that report what is allowed."""
    write_tree(tmp_path, TREE)
    for check in CHECKS:
        assert check(tmp_path) == [], check.__name__


@pytest.mark.parametrize(
    "check, path, text, words",
    [
        (unknown_modules, "lib/extra.py", "import os\n", "lib/extra.py"),
        (upward_imports, "data.py", "from training import run\nimport recode\n", "recode"),
        (upward_imports, "recode.py", "def f():\n    import eval\n", "recode.py:2: recode imports"),
        (upward_imports, "lib/parallel.py", "import recode\n", "above"),
        (upward_imports, "sandbox/lock.py", "from reward import parses\n", "none of our modules"),
        (upward_imports, "sandbox/lock.py", "from .. import reward\n", "none of our modules"),
        (upward_imports, "grpo.py", "from eval import main\n", "the program eval"),
        (upward_imports, "tasks/migration.py", "import eval\n", "the program eval"),
        (upward_imports, "docs/naive.py", "import eval\n", "the program eval"),
        (import_cycles, "reward.py", "import lib.config\n", "lib.config"),
        (import_cycles, "sandbox/lock.py", "def f():\n    from . import run\n", "sandbox"),
        (local_imports, "data.py", "def f():\n    import reward\n", "data.py:2: f imports reward"),
        (local_imports, "data.py", "class A:\n    def f(self):\n        import json\n", "json"),
        (large_top_level, "extra.py", "\n" * MAX_TOP_LINES, "lines at the top level"),
        (large_project, "tools/extra.py", "\n" * MAX_LINES, f"tools {MAX_LINES + 2}"),
        (long_functions, "data.py", "def f():\n" + "    x = 0\n" * 40, "f has 41 lines"),
        (long_functions, "data.py", "class A:\n    def f(self):\n" + 40 * "        0\n", "41"),
        (long_lines, "tools/plan.py", "#" * 101 + "\n", "tools/plan.py:1: 101 columns"),
        (long_lines, "tests/test_data.py", "#" * 101 + "\n", "tests/test_data.py:1: 101"),
        (named_lambdas, "data.py", "f = lambda x: x\n", "data.py:1"),
        (named_lambdas, "data.py", "def g():\n    h, f = 1, lambda x: x\n", "data.py:2"),
        (named_lambdas, "data.py", "if (f := lambda x: x):\n    pass\n", "data.py:1"),
    ],
)
def test_a_defect_is_found(tmp_path, check, path, text, words):
    """Stops a check that never reports anything."""
    write_tree(tmp_path, TREE | {path: text})
    found = check(tmp_path)
    assert found and words in "\n".join(found)


def test_too_many_files_are_found(tmp_path):
    """Stops a check of the top level that does not count files."""
    write_tree(tmp_path, TREE | {f"extra{i}.py": "" for i in range(8)})
    assert large_top_level(tmp_path)[0].startswith("12 files at the top level")
