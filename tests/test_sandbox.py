"""The sandbox: correct programs pass, wrong ones do not, none harms the machine (hostile.txt)."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest

import sandbox
from sandbox import lock, wire, zygote

ROOT = Path(sandbox.__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

RIGHT = "def successor(n):\n    return n + 1"
TESTS = [
    "def test_six():\n    want = 7\n    assert successor(6) == want",
    "def test_list():\n    import math\n    want = [1, 2, 3]\n"
    "    got = [successor(n) for n in range(3)]\n"
    "    assert len(got) == len(want) and got == want\n"
    "    assert all(math.isclose(g, w) for g, w in zip(got, want))",
    "def test_unit():\n    import unittest\n    items = [4]\n"
    "    unittest.TestCase().assertEqual(successor(items[0]), 5)\n    assert items == [4]",
]
SECONDS = 2.5  # timeout of each test of a hostile program


def suite():
    """(name, allowed verdicts, code) of each program in tests/hostile.txt; tests fill in CANARY."""
    parts = re.split(r"^=== ", (ROOT / "tests" / "hostile.txt").read_text(), flags=re.MULTILINE)[1:]
    heads, codes = zip(*(part.split("\n", 1) for part in parts), strict=True)
    return [(*head.split(" | "), code) for head, code in zip(heads, codes, strict=True)]


SUITE = suite()


@pytest.fixture(scope="module")
def box():
    with sandbox.Sandbox(preload=("numpy", "no_such_library"), workers=2) as box:
        yield box


@pytest.fixture(scope="module")
def auto():
    with sandbox.Sandbox(preload=("numpy",), workers=1, judge="auto") as box:
        yield box


def make_canary(place):
    """A directory outside the runs' own that must not change, and a description of it."""
    canary = Path(place, "canary")
    (canary / "tree").mkdir(parents=True)
    (canary / "keep").write_text("keep")
    (canary / "tree" / "leaf").write_text("leaf")
    return canary, describe_tree(canary)


def describe_tree(path):
    fields = ("st_mode", "st_uid", "st_size", "st_mtime_ns")
    paths = [path, *sorted(path.rglob("*"))]
    return [(str(p), *(getattr(p.lstat(), field) for field in fields)) for p in paths]


def leftovers(box):
    """The processes and files that the runs of `box` left behind, as one string."""
    found = ""
    for worker in box.workers:
        if worker.process is not None:
            pid = worker.process.pid
            found += Path(f"/proc/{pid}/task/{pid}/children").read_text()
            found += "".join(os.listdir(worker.home))
    return found


# ------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(("name", "allowed", "code"), SUITE, ids=[name for name, _, _ in SUITE])
def test_hostile(box, tmp_path, name, allowed, code):
    """Stops a wrong program from passing, a correct one from failing, any from doing harm."""
    canary, before = make_canary(tmp_path)
    started = time.monotonic()
    verdict = box.run(code.replace("CANARY", str(canary)), TESTS, timeout=SECONDS)
    assert verdict.status in allowed.split(), verdict
    assert describe_tree(canary) == before
    assert not leftovers(box)
    assert not [name for name in os.listdir("/dev/shm") if "SECRET" in name]
    assert time.monotonic() - started < len(TESTS) * SECONDS + 2
    assert verdict.reason.isprintable() and len(verdict.reason) <= 300


AS_NOBODY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import sandbox
jobs = json.load(sys.stdin)
with sandbox.Sandbox(workers=2) as box:
    print(json.dumps([[os.getuid(), verdict.status, verdict.reason] for verdict in box.map(jobs)]))
"""


def test_hostile_as_a_normal_user():
    """Stops a containment that works only for root."""
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    become += ["env", "-i", "PATH=/usr/bin:/bin"]
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to become another user")
    pythons = []
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*become, python, "-c", check]
        if subprocess.run(command, capture_output=True).returncode == 0:
            pythons.append(python)
    if not pythons:
        pytest.skip("no Python 3.11 that a normal user may run")
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(ROOT / "sandbox", Path(place) / "sandbox")
        canary, _ = make_canary(place)
        for path in (Path(place), canary, *canary.rglob("*")):
            os.chown(path, 65534, 65534)
        before = describe_tree(canary)
        codes = [code.replace("CANARY", str(canary)) for _, _, code in SUITE]
        jobs = json.dumps([{"code": c, "tests": TESTS, "timeout": SECONDS} for c in codes])
        command = [*become, pythons[0], "-c", AS_NOBODY, place]
        run = subprocess.run(
            command, input=jobs, capture_output=True, text=True, timeout=300, cwd="/"
        )
        assert run.returncode == 0, run.stderr
        outcomes = json.loads(run.stdout)
        assert describe_tree(canary) == before
    wrong = []
    for (name, allowed, _), (_, status, reason) in zip(SUITE, outcomes, strict=True):
        if status not in allowed.split():
            wrong.append((name, status, reason))
    assert not wrong and {uid for uid, _, _ in outcomes} == {65534}


def test_statuses_and_reasons(box):
    """Stops blaming the program for a broken setup or test, and a pass without any test."""
    assert box.run(RIGHT, TESTS) == sandbox.Verdict("pass", "", "split")
    assert box.run(RIGHT, TESTS).passed
    long = "def successor(n):\n    raise ValueError('no\\x00\\x1b[2J' + 'A' * 10**6)"
    verdict = box.run(long, TESTS)
    assert (verdict.status, verdict.passed) == ("fail", False)
    assert verdict.reason.startswith("ValueError: no??[2JAAA") and len(verdict.reason) == 300
    assert box.run(RIGHT, []).status == "error"
    assert box.run(RIGHT, ["x = 1"]).status == "error"
    assert box.run(RIGHT, ["def test("]).status == "error"
    assert box.run(RIGHT, TESTS, setup="1 / 0").reason == "ZeroDivisionError: division by zero"
    assert box.run(RIGHT, TESTS[0]).passed  # one test instead of a list
    assert box.run("x = '\ud800'", TESTS).status == "fail"  # cannot be encoded as UTF-8
    assert box.run("x = '\0'", TESTS).status == "fail"
    late = box.run("def successor(n):\n    while True: pass", TESTS, timeout=0.3)
    assert late == sandbox.Verdict("timeout", "no verdict in time", "split")


def test_check_with_an_entry_point(box):
    """Stops a program from replacing the prompt's helpers, and a stub from being the answer."""
    prompt = """
import math
def poly(xs, x):
    return sum(c * x**i for i, c in enumerate(xs))
def zero(xs):
    '...'
"""
    test = """
def check(candidate):
    assert math.fabs(poly([-6, 2], candidate([-6, 2]))) < 1e-9 and zero([-2, 1]) == 2
"""

    def run(code):
        return box.run(code, [test], setup=prompt, entry_point="zero").status

    assert run(prompt + "    return -xs[0] / xs[1]") == "pass"
    assert run(prompt + "    return 0") == "fail"
    assert run("def poly(*a): return 0\nmath = None\ndef zero(xs): return 2") == "fail"
    assert run("") == "fail"
    test = "def test():\n    assert sum(1) == 1"
    assert box.run("def sum(x): return x", [test], entry_point="sum").passed


def test_an_update_applies_to_program_and_test(box):
    """Stops a CodeUpdateArena update from missing in one process, or outliving its test."""
    setup = """
import math
old = math.sqrt
def sqrt(x, scale=1):
    return old(x) * scale
math.sqrt = sqrt
"""
    code = """
import math
calls = []
def f(x):
    calls.append(x)
    return math.sqrt(x, scale=3) + len(calls)
"""
    tests = [
        "def test_a():\n    assert f(4) == 7",
        "def test_b():\n    assert f(4) == math.sqrt(4, scale=3) + 1",
    ]
    assert box.run(code, tests, setup=setup).passed
    assert not box.run(code, tests, setup="import math").passed
    code = "def f(x): return np.cos(x)\nimport numpy as np"
    assert box.run(code, ["def test():\n    assert f(0) == np.cos(0.0)"]).passed


# ------------------------------------------------------------------------- values and calls


VALUES = """
import collections, datetime, decimal, fractions, math, re
import numpy as np
VALUES = [None, True, 10**4000, -0.0, math.inf, 1j, "\\ud800\\0", b"\\xff", [], (), {}, set(),
    [[1, (2, {3: {4}})]], frozenset({1}), range(1, 9, 2), slice(1, None), bytearray(b"x"),
    collections.deque([1, 2], 5),
    collections.Counter("hello"), collections.OrderedDict(b=1, a=2), datetime.date(2024, 2, 29),
    datetime.datetime(2024, 1, 1, 1, 1, 1, 1, datetime.timezone.utc), datetime.timedelta(1, 2, 3),
    decimal.Decimal("1.10"), fractions.Fraction(1, 3), re.compile("a+", re.I), re.ASCII,
    list(np.arange(200)), tuple(np.linspace(0, 1, 200)), np.float32(1.5), np.int64(3),
    np.datetime64("2024-01-01"), np.str_("x"), np.bool_(True)]
ARRAYS = [np.zeros((0, 3)), np.arange(6).reshape(2, 3).T, np.array(1), np.array(["ab", "c"]),
    np.ones(2, bool)]
"""


def test_values_arrive_unchanged(box):
    """Stops a value from arriving changed or with another type (1 for True, tuple for list)."""
    code = "def same(x): return x\ndef kind(x): return repr(type(x))"
    test = """
def test_values():
    for value in VALUES:
        back = same(value)
        assert back == value and type(back) is type(value) and repr(back) == repr(value), value
        assert kind(value) == repr(type(value)), value
    for value in ARRAYS:
        back = same(value)
        assert np.array_equal(back, value)
        assert back.dtype == value.dtype and back.shape == value.shape
        back[...] = value  # still writable
    nan = same([float("nan")])[0]
    assert nan != nan
    match = same(re.search(r"b(?P<x>c)?", "abcd"))
    assert match["x"] == "c" and match.span() == (1, 3) and match.string == "abcd"
    counts = same(collections.defaultdict(int, a=1))
    assert counts["missing"] == 0 and counts["a"] == 1
"""
    assert box.run(code, [test], setup=VALUES) == sandbox.Verdict("pass")


def test_calls_work_across_processes(box):
    """Stops functions, iterators, exceptions and in-place changes from getting lost on the wire."""
    code = """
def compose(f, g): return lambda x: f(g(x))
def forever():
    n = 0
    while True:
        yield n
        n += 1
def fill(target, *, value): target[:] = [value] * len(target)
def grab(target):
    target.clear()
    return []
def fails(kind):
    class Own(kind): pass
    raise Own("text", "document", 3) if kind.__module__ == "json.decoder" else Own("text", 3)
def stop(x): raise StopIteration
total = lambda items: sum(items)
LIMIT = [1, 2]
"""
    test = """
def test_calls():
    import itertools
    assert compose(lambda x: x + 1, abs)(-3) == 4
    assert list(itertools.islice(forever(), 3)) == [0, 1, 2]
    assert total(iter([1, 2])) == 3 and LIMIT == [1, 2]
    items = [0, 0]
    assert fill(items, value=7) is None and items == [7, 7]
    assert grab(items) == [] and items == [7, 7]  # grab returns a value, so items stay as they are
    import json
    for kind in (ValueError, KeyError, ZeroDivisionError, json.JSONDecodeError):
        try: fails(kind)
        except kind as error: assert error.args[0].startswith("text")
        else: assert False
    try: list(map(stop, [1, 2]))
    except RuntimeError: pass
    else: assert False, "the loop ended as if it were complete"
"""
    assert box.run(code, [test]) == sandbox.Verdict("pass")


def test_an_except_cannot_hide_an_unsendable_value(box):
    """Stops an `except` in a test from turning a value that could not be sent into a pass."""
    code = "class Own: pass\ndef f(): return Own()"
    for clause in ("except Exception", "except"):
        verdict = box.run(code, [f"def test():\n    try: f()\n    {clause}: pass"])
        assert verdict == sandbox.Verdict("fail", "not carried: a program.Own", "split")


def test_messages_load_no_class():
    """Stops a reply that names a class from running code in the judge."""
    import io
    import pickle

    for value in (os.system, math.nan.__class__, ValueError(), Path("x"), wire.Peer):
        with pytest.raises(wire.Broken):
            wire.Plain(io.BytesIO(pickle.dumps(value))).load()
    value = (1, [b"x"], {"a": None})
    assert wire.Plain(io.BytesIO(pickle.dumps(value))).load() == value


# ------------------------------------------------------------------------- the in-process judge


OWN = "class Own:\n    def __init__(self, n): self.n = n\ndef make(n): return Own(n)\n"
LOOK = [
    "def test_own():\n    import math, unittest\n"
    "    unittest.TestCase().assertTrue(math.isclose(make(3).n, 3))"
]


def test_unsendable_values_are_judged_in_process(box, auto):
    """Stops instances of a program's classes from failing, or from passing unmarked."""
    assert not box.run(OWN, LOOK).passed
    assert auto.run(OWN, LOOK) == sandbox.Verdict("pass", "", "in-process")
    assert auto.run(RIGHT, TESTS) == sandbox.Verdict("pass", "", "split")
    assert auto.run(OWN.replace("= n", "= n + 1"), LOOK).status == "fail"


@pytest.mark.parametrize(
    "patch",
    [
        "import math; math.isclose = lambda *a, **k: True",
        "import unittest; unittest.TestCase.assertTrue = lambda *a: None",
        "import unittest; unittest.TestCase.assertTrue.__defaults__ = (1,)\n"
        "unittest.case.bool = print",
        "import builtins; builtins.AssertionError = builtins.__import__ = print",
        "import sys; sys.modules['math'] = sys.modules['unittest'] = print",
        "def isclose(*a, **k): return True\nassertTrue = all = isclose",
    ],
)
def test_modules_are_restored_before_the_test(auto, patch):
    """Stops a wrong program from passing because it patched what the test relies on."""
    assert auto.run(OWN.replace("= n", "= n + 1") + patch, LOOK).status == "fail"


@pytest.mark.parametrize(
    "change",
    [
        "import math; math.isclose = lambda *a, **k: True",
        "import unittest; unittest.TestCase.assertTrue = lambda *a: None",
        "import unittest; unittest.case.isinstance = unittest.case.bool = lambda *a: True",
        "import json; json.dumps = lambda *a, **k: '[\"pass\", \"\", \"\"]'",
    ],
)
def test_modules_are_compared_after_the_test(auto, change):
    """Stops the same patches when they are made only once the test calls the program."""
    code = OWN.replace("return Own", f"{change}; return Own").replace("= n", "= n + 1")
    assert auto.run(code, ["import math, unittest\n" + LOOK[0]]).status == "fail"


def test_long_reasons_arrive(auto):
    """Stops a program from ending the zygote by a reason that does not fit the pipe."""
    test = ["def test_f():\n    f()"]
    code = "def f():\n    return type('\U0001f600' * 300, (), {})()"
    assert auto.run(code, test).status != "error"
    code = f"import sys\nx = (sys{' ' * 5000}.\n modules)\n{OWN}def f(): return Own(1)"
    result = auto.run(code, test)
    assert result.status == "fail" and result.reason.isprintable() and len(result.reason) <= 300


def test_liars_and_spies_are_refused(auto):
    """Stops objects that equal everything, and reading the expected value from the test's frame."""
    yes = "class Yes:\n    __eq__ = lambda *a: True\ndef successor(n): return {}"
    for shape in ("Yes()", "[Yes(), Yes(), Yes()]"):
        assert auto.run(yes.format(shape), TESTS).status == "fail"
    spy = OWN + "import sys\ndef successor(n): return Own(sys._getframe(1).f_locals.get('want'))"
    assert "_getframe" in auto.run(spy, TESTS).reason


# ------------------------------------------------------------------------- the harness


def start_with(monkeypatch, code):
    """Make the zygotes of this test run `code` before they serve."""
    start = sandbox.START.replace("zygote.serve()", f"{code}; zygote.serve()")
    monkeypatch.setattr(sandbox, "START", start)


@pytest.mark.parametrize(
    "lack",
    [
        "sys.modules['sandbox.lock'].SYS_LANDLOCK_CREATE_RULESET = 9999",
        "sys.modules['sandbox.lock'].FS_ALL = 1 << 40",
        "sys.modules['sandbox.lock'].FILTER = bytes(8)",
        "sys.modules['sandbox.lock'].platform.machine = lambda: 'aarch64'",
    ],
)
def test_fails_closed(monkeypatch, tmp_path, lack):
    """Stops programs from running with the user's full permissions where the lock is missing."""
    start_with(monkeypatch, lack)
    with sandbox.Sandbox(workers=1) as box, pytest.raises(sandbox.Unavailable):
        box.run(f"open('{tmp_path}/written', 'w')\n{RIGHT}", TESTS)
    with pytest.warns(UserWarning, match="UNSAFE"), sandbox.Sandbox(workers=1, unsafe=True) as box:
        assert box.run(RIGHT, TESTS).passed
    assert os.listdir(tmp_path) == []


def test_unsafe_still_collects_orphans():
    """Stops the child processes of an unlocked program from outliving the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        box = sandbox.Sandbox(workers=1, unsafe=True)
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    os.fork()
    time.sleep(60)
"""
    with box:
        assert box.run(code + RIGHT, TESTS).passed and not leftovers(box)


def test_the_harness_outlives_its_zygotes(monkeypatch):
    """Stops a zygote that dies or hangs from ending or blocking the evaluation."""
    monkeypatch.setattr(sandbox, "GRACE", 0.5)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        with sandbox.Sandbox(workers=1) as box:
            assert box.run(RIGHT, TESTS).passed
            process, home = box.workers[0].process, box.workers[0].home
            threading.Timer(0.3, os.kill, (process.pid, number)).start()
            assert box.run("import time\ntime.sleep(60)", TESTS, timeout=1).status == "error"
            assert not os.path.exists(home) and process.poll() is not None
            assert box.run(RIGHT, TESTS).passed
            home = box.workers[0].home
        assert not os.path.exists(home)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import sandbox
box = sandbox.Sandbox(workers=1)
assert box.run("def f(): return 1", ["def test_f():\\n    assert f() == 1"]).passed
print(box.workers[0].process.pid, box.workers[0].home, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_zygotes_do_not_outlive_the_harness():
    """Stops a killed evaluation from leaving helper processes and their directories behind."""
    command = [sys.executable, "-c", KILLED, str(ROOT)]
    pid, home = subprocess.run(command, capture_output=True, text=True).stdout.split()
    left = [home, f"/proc/{pid}/exe"]
    deadline = time.monotonic() + 10
    while any(map(os.path.exists, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(home) and not os.path.exists(f"/proc/{pid}/exe")


def test_nothing_grows(box):
    """Stops descriptors, files, processes, threads or memory from piling up over many programs."""

    def usage():
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer) and thread.finished.is_set():
                thread.join()  # a cancelled deadline whose thread is still ending
        pids = [os.getpid(), *(worker.process.pid for worker in box.workers)]
        fds = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return fds, pages * 4096, threading.active_count()

    programs = [
        RIGHT,
        "open('left', 'w').write('x' * 1000)\nx = bytearray(10**7)\n1 / 0",
        "import os; os._exit(0)",
    ]
    jobs = [{"code": programs[i % 3], "tests": TESTS[:1]} for i in range(60)]
    list(box.map(jobs))
    fds, memory, threads = usage()
    verdicts = list(box.map(jobs * 4))
    assert [verdict.passed for verdict in verdicts] == [True, False, False] * 80  # in order
    assert usage()[0] == fds and usage()[2] == threads and not leftovers(box)
    assert usage()[1] - memory < 10 << 20


def test_the_default_pool():
    """Stops an incompatible change of `sandbox.run`, which other programs call."""
    assert sandbox.run(RIGHT, TESTS).passed
    assert sandbox.run(RIGHT, TESTS, timeout=5.0, setup="", entry_point=None).status == "pass"
    assert sandbox.run("successor = None", TESTS).status == "fail"
    assert len(sandbox.default().workers) == 2
    sandbox.default().close()


def test_any_directory_tree_is_removed(tmp_path):
    """Stops deep or unreadable trees, on which shutil.rmtree gives up, from staying on disk."""
    top, here = tmp_path / "top", os.getcwd()
    top.mkdir()
    os.chdir(top)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)
    (top / "closed" / "inner").mkdir(parents=True)
    (top / "link").symlink_to(tmp_path)
    (top / "closed" / "inner").chmod(0)
    (top / "closed").chmod(0)
    (tmp_path / "keep").write_text("")
    zygote.remove(str(top))
    zygote.remove(str(top))  # a missing directory is no error
    assert os.listdir(tmp_path) == ["keep"]


def test_system_call_numbers_match_the_kernel():
    """Stops a wrong system call number, which would block nothing or break honest programs."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers here")
    found = re.findall(r"#define __NR_(\w+) (\d+)", header.read_text())
    known = {name: int(number) for name, number in found}
    ours = lock.DENIED | lock.IGNORED
    assert {name: n for name, n in ours.items() if known.get(name, n) != n} == {}
    assert len(set(ours.values())) == len(ours) and len(set(ours) & set(known)) > 80
