"""What runs in the locked process: setup, the program and the test.

What the program replaced in modules is restored before the test runs, so a patched `math.isclose`
does not fool it. A program that patches while the test runs is not stopped.
"""

import builtins
import contextlib
import linecache
import re
import sys
import types


class Saved:
    """The attributes of modules and of the classes in them, to restore after the program ran.

    Only of packages that `text`, all code that runs, names: to copy all of torch's takes 0.1 s.
    """

    def __init__(self, text):
        words = {"builtins", "sys", *re.findall(r"\w+", text)}
        self.builtins = set(vars(builtins))
        self.modules = dict(sys.modules)
        named = [module for name, module in self.modules.items() if name.split(".")[0] in words]
        found = [vars(module) for module in named if isinstance(module, types.ModuleType)]
        self.names = [(names, dict(names)) for names in found]
        values = [value for names in found for value in names.values()]
        classes = {id(value): value for value in values if issubclass(type(value), type)}
        self.classes = [(kind, dict(vars(kind))) for kind in classes.values()]

    def restore(self):
        for names, copy in self.names:  # builtins are among them: call none before
            names.update(copy)
        sys.modules.update(self.modules)
        for names, copy in self.names:  # other new names stay: submodules that it imported
            for name in self.builtins & names.keys() - copy.keys():
                del names[name]  # it hides a builtin
        for kind, copy in self.classes:
            for name, value in copy.items():
                if vars(kind).get(name) is not value:
                    type.__setattr__(kind, name, value)


def describe(error):
    """A short line about an exception, whose own methods may fail."""
    text = type(error).__name__
    with contextlib.suppress(BaseException):
        text = f"{text}: {error}"
    return text[:300]


def execute(source, name, scope):
    file = f"<{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file  # inspect.getsource
    exec(compile(source, file, "exec"), scope)


def judge(job, test):
    """(status, reason) of a test: pass or fail, or error if setup or the test is broken."""
    # Dataclasses look for their module. Its name is no word, so Saved leaves it out.
    sys.modules["<program>"] = types.ModuleType("<program>")
    scope = vars(sys.modules["<program>"])
    entry_point = job["entry_point"]
    try:
        execute(job["setup"], "setup", scope)
        code = compile(test, "<test>", "exec")
        for line in re.findall(r"^\s*((?:import|from) [^;\n]+)", test, re.MULTILINE):
            with contextlib.suppress(Exception):  # loaded before the program, so restored after it
                exec(line, {})
    except BaseException as error:
        return "error", describe(error)
    calls = [name for name in code.co_names if name.startswith("test")]
    if entry_point and "check" in code.co_names:
        calls = ["check"]
    if not calls:
        return "error", "the test defines neither test_* nor, with an entry point, check"
    trusted = dict(scope)
    saved = Saved(job["setup"] + job["code"] + test)
    try:
        execute(job["code"], "program", scope)
        saved.restore()
        seen = {name: value for name, value in scope.items() if name not in saved.builtins}
        seen |= trusted
        if entry_point:
            seen[entry_point] = scope[entry_point]
        exec(code, seen)
        for name in calls:
            if name == "check":
                seen[name](seen[entry_point])
            elif callable(seen.get(name)):  # not a list of test cases
                seen[name]()
        return "pass", ""
    except BaseException as error:
        return "fail", describe(error)
