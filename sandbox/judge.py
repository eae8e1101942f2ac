"""What runs in the locked processes: a program and its judge, which runs a test.

    program(job, peer)              run the program and answer calls, in a process of its own
    split_judge(job, test, peer)    run a test, which calls the program over the wire
    joint_judge(job, test)          run both in one process, for values that no wire carries

The joint judge restores loaded modules before the test runs and checks them afterwards. It stops
what a model may write by accident or by habit, not a program that knows this file.
"""

import builtins
import contextlib
import functools
import linecache
import re
import sys
import types

from sandbox.wire import Uncarried, describe

ALIASES = dict(np="numpy", pd="pandas", sp="sympy", nn="torch.nn", F="torch.nn.functional")
HEAPTYPE = 1 << 9  # in a class's __flags__: its attributes can be replaced
# Ways to the test's values and the verdict pipe, which code that solves a benchmark does not need.
SPYING = re.compile(
    r"\b(_getframe|_current_frames|currentframe|f_back|f_locals|f_globals|tb_frame|gi_frame"
    r"|cr_frame|ag_frame|__code__|__globals__|__closure__|__subclasses__|settrace|setprofile"
    r"|get_objects|get_referrers|ctypes|posix|sys\s*\.\s*modules|from\s+os\s+import"
    r"|os\s*\.\s*(_exit|p?read|p?write|readv|writev|dup2?|fdopen|sendfile|splice))\b"
)


def namespace(name):
    """The dict of a new module, which e.g. dataclasses find by its name."""
    sys.modules[name] = types.ModuleType(name)
    return vars(sys.modules[name])


def execute(source, name, scope):
    file = f"<{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file  # inspect.getsource
    exec(compile(source, file, "exec"), scope)


def names_used(code):
    """All names in a code object and the functions in it: its globals and more."""
    inner = [names_used(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)


def prepare(job, test, scope):
    """Run `setup` in `scope` and compile the test. An error here is not the program's fault."""
    execute(job["setup"], "setup", scope)
    code = compile(test, "<test>", "exec")
    check = job["entry_point"] and "check" in code.co_names
    if not check and not any(name.startswith("test") for name in code.co_names):
        raise ValueError("the test defines neither test_* nor, with an entry point, check")
    return code


def run_tests(code, scope, entry_point, find):
    """Run a test in `scope`, the trusted names. find(names) returns the program's."""
    wanted = names_used(code) - set(scope) - set(vars(builtins))
    if entry_point:
        wanted.add(entry_point)
    found = find(sorted(wanted))  # take no other name from it: it could hide a builtin
    scope |= {name: found[name] for name in wanted if name in found}
    exec(code, scope)
    if entry_point and "check" in scope:
        return scope["check"](found[entry_point])
    tests = [name for name in code.co_names if name.startswith("test")]
    for test in [scope[name] for name in tests if callable(scope.get(name))]:
        test()


def program(job, peer):
    """Run the program, then answer the judge's calls forever."""
    scope = namespace("program")
    failure = None
    try:
        execute(job["setup"], "setup", scope)
        execute(job["code"], "program", scope)
    except BaseException as error:
        failure = error

    def find(names):
        if failure is not None:
            raise failure
        found = {}
        for name in [name for name in names if name in scope]:
            with contextlib.suppress(Uncarried):
                peer.encode(scope[name])
                found[name] = scope[name]
        return found

    peer.handles.append(find)
    while True:
        peer.answer(*peer.receive()[1:])


def split_judge(job, test, peer):
    """(status, reason, doubt) of a test; `doubt` says why a failure may be wrong, or is ""."""
    scope = namespace("checks")
    try:
        code = prepare(job, test, scope)
    except BaseException as error:
        return "error", describe(error), ""

    def find(names):
        """The program's own names, and those of a library under the library's name or alias."""
        peer.trusts = True
        found = peer.call(0, [names], {})
        peer.trusts = False
        for name, value in list(found.items()):  # a function that calls back is called "program"
            if getattr(value, "__name__", None) not in (None, "program", name, ALIASES.get(name)):
                del found[name]
        return found

    try:
        run_tests(code, scope, job["entry_point"], find)
    except BaseException as error:
        shared = "random state is not shared" if "rand" in test else ""
        return "fail", describe(error), peer.doubt or shared
    if peer.failed:  # and the test caught it
        return "fail", peer.doubt, peer.doubt
    return "pass", "", ""


class Watch:
    """A copy of the loaded modules, their classes and functions' code, to restore and compare."""

    def __init__(self):
        self.modules = {k: v for k, v in sys.modules.items() if isinstance(v, types.ModuleType)}
        owners = {id(module): module for module in self.modules.values()}
        for module in list(owners.values()):
            classes = [value for value in vars(module).values() if isinstance(value, type)]
            owners |= {id(kind): kind for kind in classes if kind.__flags__ & HEAPTYPE}
        self.owners = [(owner, dict(vars(owner))) for owner in owners.values()]
        values = [value for _, names in self.owners for value in names.values()]
        self.code = [(v, v.__code__) for v in values if type(v) is types.FunctionType]

    def changes(self):
        """(owner, name, old value) of each change; `...` if a new name hides a builtin."""
        for owner, old in self.owners:
            now = vars(owner)
            yield from [(owner, k, v) for k, v in old.items() if now.get(k, ...) is not v]
            yield from [(owner, k, ...) for k in now.keys() - old.keys() if hasattr(builtins, k)]
        yield from [(f, "__code__", code) for f, code in self.code if f.__code__ is not code]

    def restore(self):
        sys.modules.update(self.modules)
        for name in set(sys.modules) - set(self.modules):  # the test must import them again
            if name.partition(".")[0] in sys.stdlib_module_names:
                del sys.modules[name]
        for owner, name, old in list(self.changes()):
            with contextlib.suppress(AttributeError, TypeError):  # __dict__ and the like
                if old is ...:
                    delattr(owner, name)
                else:
                    setattr(owner, name, old)

    def audit(self):
        """PermissionError if a function, class or module was replaced or a builtin hidden."""
        kinds = types.ModuleType, types.CodeType, types.EllipsisType
        found = [name for _, name, old in self.changes() if callable(old) or type(old) in kinds]
        found += [name for name, old in self.modules.items() if sys.modules.get(name) is not old]
        if found:
            raise PermissionError(f"the program replaced {', '.join(found[:5])}")


def honest(function):
    """`function`, with PermissionError if its value, or a member, equals an object it never saw."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        value = function(*args, **kwargs)
        members = [value]
        if isinstance(value, dict):
            members += value.values()
        elif isinstance(value, list | tuple | set):
            members += value
        for member in members:
            own = type(member).__module__ in ("program", "unittest.mock")
            if own and (member == object() or not member != object()):
                raise PermissionError("the program returns what equals everything")
        return value

    return checked


def joint_judge(job, test):
    """(status, reason, doubt), as in split_judge."""
    if spying := SPYING.search(job["code"]):
        name = "".join(spying[0].split())
        return "fail", f"not judged in one process: the program uses {name}", ""
    scope = namespace("program")
    try:
        code = prepare(job, test, scope)
    except BaseException as error:
        return "error", describe(error), ""
    trusted = dict(scope)
    watch = Watch()
    try:
        execute(job["code"], "program", scope)
        watch.restore()
        own = {k: honest(v) if type(v) is types.FunctionType else v for k, v in scope.items()}
        run_tests(code, trusted, job["entry_point"], lambda names: own)
        watch.audit()
    except BaseException as error:
        return "fail", describe(error), ""
    finally:
        watch.restore()  # what sends the verdict
    return "pass", "", ""
