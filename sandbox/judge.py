"""The judges: what runs in the locked processes, a program and its tests.

    program(job, peer)              runs the program and answers calls: its own process
    split_judge(job, test, peer)    runs a test whose calls go over the wire: the process of the verdict
    joint_judge(job, test)          runs both in one process, for values that no wire carries

The joint judge restores what the program changed in loaded modules before the test runs, and looks again
after it. It stops what a model may write by accident or by habit. It cannot stop a program that knows it.
"""

import builtins
import contextlib
import functools
import linecache
import re
import sys
import types

from sandbox.wire import Uncarried, describe

ALIASES = {"np": "numpy", "pd": "pandas", "F": "torch.nn.functional", "nn": "torch.nn", "sp": "sympy"}


def namespace(name):
    """The dict of a fresh module, which dataclasses and others find by its name."""
    sys.modules[name] = types.ModuleType(name)
    return vars(sys.modules[name])


def execute(source, name, scope):
    linecache.cache[f"<{name}>"] = len(source), None, source.splitlines(True), f"<{name}>"  # for inspect.getsource
    exec(compile(source, f"<{name}>", "exec"), scope)


def names_used(code):
    """All names in a code object and the functions in it: its globals, and more."""
    inner = [names_used(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)


def prepare(job, test, scope):
    """Run `setup` in `scope`; the test's code object. What goes wrong here is not the program's fault."""
    execute(job["setup"], "setup", scope)
    code = compile(test, "<test>", "exec")
    checks = {"check"} if job["entry_point"] else set()
    if not [name for name in code.co_names if name.startswith("test") or name in checks]:
        raise ValueError("the test defines neither test_* nor, with an entry point, check")
    return code


def run_tests(code, scope, entry_point, find):
    """Run one test in `scope`, the trusted names; find(names) gives the program's. Raises what fails."""
    wanted = names_used(code) - set(scope) - set(vars(builtins)) | ({entry_point} if entry_point else set())
    found = find(sorted(wanted))  # may hold more: what nobody asked for could shadow a builtin
    scope |= {name: found[name] for name in wanted if name in found}
    exec(code, scope)
    if entry_point and "check" in scope:
        return scope["check"](found[entry_point])
    for name in [name for name in code.co_names if name.startswith("test") and callable(scope.get(name))]:
        scope[name]()


# ------------------------------------------------------------------------- two processes


def program(job, peer):
    """Run the program, then answer the judge's calls for ever."""
    scope, failure = namespace("program"), None
    try:
        execute(job["setup"], "setup", scope)
        execute(job["code"], "program", scope)
    except BaseException as error:
        failure = error

    def carries(value):
        with contextlib.suppress(Uncarried):
            peer.encode(value)
            return True

    def find(names):
        if failure is not None:
            raise failure
        return {name: scope[name] for name in names if name in scope and carries(scope[name])}

    peer.handles.append(find)
    while True:
        peer.answer(*peer.receive()[1:])


def split_judge(job, test, peer):
    """(status, reason, doubt): doubt is why the program may deserve better, or ""."""
    scope = namespace("checks")
    try:
        code = prepare(job, test, scope)
    except BaseException as error:
        return "error", describe(error), ""

    def find(names):
        """What the program defines, and what it takes from a library under the library's own name."""
        peer.trusts = True
        found = peer.call(0, [names], {})
        peer.trusts = False
        own = "program", None  # the name of a function that calls back; data has none
        return {k: v for k, v in found.items() if getattr(v, "__name__", None) in (k, ALIASES.get(k, k), *own)}

    try:
        run_tests(code, scope, job["entry_point"], find)
    except BaseException as error:
        shared = "random state is not shared" if "rand" in test else ""
        return "fail", describe(error), peer.doubt or shared
    return ("fail" if peer.failed else "pass"), peer.doubt if peer.failed else "", peer.doubt


# ------------------------------------------------------------------------- one process

# Ways to the test's values and to the verdict's pipe. Code that answers a question of a benchmark needs none.
SPYING = re.compile(
    r"\b(_getframe|_current_frames|currentframe|f_back|f_locals|f_globals|tb_frame|gi_frame|cr_frame|ag_frame|"
    r"__code__|__globals__|__closure__|__subclasses__|settrace|setprofile|get_objects|get_referrers|ctypes|posix|"
    r"sys\s*\.\s*modules|os\s*\.\s*(_exit|p?read|p?write|readv|writev|dup2?|fdopen|sendfile|splice)|from\s+os\s+import)\b"
)


class Watch:
    """What the loaded modules and their classes hold, and the code of their functions: to restore, to compare."""

    def __init__(self):
        self.modules = {name: m for name, m in sys.modules.items() if isinstance(m, types.ModuleType)}
        owners = {id(module): module for module in self.modules.values()}
        for module in list(owners.values()):
            classes = [v for v in vars(module).values() if isinstance(v, type) and v.__flags__ & 1 << 9]  # HEAPTYPE
            owners |= {id(kind): kind for kind in classes}  # those whose attributes can be replaced
        self.owners = [(owner, dict(vars(owner))) for owner in owners.values()]
        functions = [v for _, names in self.owners for v in names.values() if type(v) is types.FunctionType]
        self.code = [(function, function.__code__) for function in functions]

    def changes(self):
        """(owner, name, old value) of what is not as it was; `...` for what was not there and hides a builtin."""
        for owner, old in self.owners:
            now = vars(owner)
            if len(now) != len(old) or any(now.get(k, ...) is not v for k, v in old.items()):
                yield from [(owner, k, v) for k, v in old.items() if now.get(k, ...) is not v]
                yield from [(owner, k, ...) for k in now if k not in old and hasattr(builtins, k)]

    def restore(self):
        sys.modules.update(self.modules)
        for name in set(sys.modules) - set(self.modules):  # the test is to import them anew
            if name.partition(".")[0] in sys.stdlib_module_names:
                del sys.modules[name]
        for owner, name, old in list(self.changes()):
            with contextlib.suppress(AttributeError, TypeError):  # __dict__ and the like
                delattr(owner, name) if old is ... else setattr(owner, name, old)
        for function, code in self.code:
            function.__code__ = code

    def audit(self):
        """PermissionError if a function, class or module has been replaced, or a builtin hidden."""
        found = [name for _, name, old in self.changes() if old is ... or callable(old) or type(old) is type(sys)]
        found += [name for name, module in self.modules.items() if sys.modules.get(name) is not module]
        found += [function.__name__ for function, code in self.code if function.__code__ is not code]
        if found:
            raise PermissionError(f"the program replaced {', '.join(found[:5])}")


def honest(function):
    """`function`, but PermissionError where its value, or a member of it, claims to equal an object it never saw."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        value = function(*args, **kwargs)
        members = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        for each in (value, *members):
            if type(each).__module__ in ("program", "unittest.mock") and (each == object() or not each != object()):
                raise PermissionError("the program returns what equals everything")
        return value

    return checked


def joint_judge(job, test):
    """(status, reason, doubt), as split_judge."""
    if spying := SPYING.search(job["code"]):
        return "fail", f"not judged in one process: the program uses {spying[0]}", ""
    scope = namespace("program")
    try:
        code = prepare(job, test, scope)
    except BaseException as error:
        return "error", describe(error), ""
    trusted, watch = dict(scope), Watch()
    try:
        execute(job["code"], "program", scope)
        watch.restore()
        own = {name: honest(v) if type(v) is types.FunctionType else v for name, v in scope.items()}
        run_tests(code, trusted, job["entry_point"], lambda names: own)
        watch.audit()
    except BaseException as error:
        return "fail", describe(error), ""
    return "pass", "", ""
