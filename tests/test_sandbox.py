"""The sandbox: correct programs pass, wrong ones do not, none harms the machine (hostile.txt)."""

import json
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sandbox
from sandbox import lock, zygote

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
from concurrent.futures import ThreadPoolExecutor
import sandbox
def run(job): return vars(box.run(**job)) | {"uid": os.getuid()}
with sandbox.Sandbox(workers=2) as box, ThreadPoolExecutor(2) as pool:
    print(json.dumps([*pool.map(run, json.load(sys.stdin))]))
"""


@pytest.mark.slow
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
    for (name, allowed, _), outcome in zip(SUITE, outcomes, strict=True):
        if outcome["status"] not in allowed.split():
            wrong.append((name, outcome))
    assert not wrong and {outcome["uid"] for outcome in outcomes} == {65534}


def test_statuses_and_reasons(box):
    """Stops blaming the program for a broken setup or test, and a pass without any test."""
    assert box.run(RIGHT, TESTS) == sandbox.Verdict("pass", "")
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
    assert late == sandbox.Verdict("timeout", "no verdict in time")


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


# ------------------------------------------------------------------------- forms of an answer


FORMS = {
    "a decorator": "@functools.lru_cache(None)\ndef common(a, b): return math.gcd(a, b)",
    "a bare decorator": "@functools.cache\ndef common(a, b): return math.gcd(a, b)",
    "its own decorator": (
        "def twice(f):\n    def inner(*args): return f(*args) // 2\n    return inner\n"
        "@twice\ndef common(a, b): return 2 * math.gcd(a, b)"
    ),
    "a partial": "common = functools.partial(lambda f, a, b: f(a, b), math.gcd)",
    "a built-in function": "common = math.gcd",
    "an import": "from math import gcd as common",
    "a ufunc": "import numpy\ncommon = numpy.gcd",
    "np.vectorize": "import numpy as np\ncommon = np.vectorize(math.gcd)",
    "a lambda": "common = lambda a, b: a if b == 0 else common(b, a % b)",
    "an object": "class Common:\n    def __call__(self, a, b): return math.gcd(a, b)\n"
    "common = Common()",
    "a bound method": "class Common:\n    def of(self, a, b): return math.gcd(a, b)\n"
    "common = Common().of",
    "a static method": "class Common:\n    @staticmethod\n    def of(a, b): return math.gcd(a, b)\n"
    "common = Common.of",
    "a class": "class common(int):\n    def __new__(cls, a, b): return int(math.gcd(a, b))",
    "its own int": "class Own(int): pass\ndef common(a, b): return Own(math.gcd(a, b))",
    "singledispatch": "@functools.singledispatch\ndef common(a, b): return math.gcd(a, b)",
    "globals()": "globals()['common'] = lambda a, b: math.gcd(a, b)",
    "exec": "exec('def common(a, b): return math.gcd(a, b)')",
    "its module": "import sys\nsetattr(sys.modules[__name__], 'common', math.gcd)",
    "a word of ours": "# the program\ndef common(a, b): return math.gcd(a, b)",
    "names below it": "def common(a, b): return f(a, b)\nfrom math import gcd as f",
    "names of the test": "values = [math.gcd]\ndef common(a, b): return values[0](a, b)",
    "a submodule": "import xml.dom.minidom\n"
    "def common(a, b): return xml.dom.minidom and math.gcd(a, b)",
    "a patched module": "math.gcd, own = None, math.gcd\ndef common(a, b): return own(a, b)",
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_a_right_answer_passes(box, form):
    """Stops right answers from failing because they are no plain function, or share a name."""
    setup = "import functools, math, xml\ndef common(a, b):\n    pass\n"
    test = """
values = [(12, 18, 6), (7, 5, 1), (0, 4, 4)]
def check(candidate):
    for a, b, want in values:
        assert candidate(a, b) == want == common(a, b) == math.gcd(a, b)
"""
    assert box.run(FORMS[form], [test], setup, entry_point="common") == sandbox.Verdict("pass")


def test_values_of_any_kind_pass(box):
    """Stops generators, own classes, dataclasses and their tests from needing plain values."""
    code = """
import dataclasses, decimal
@dataclasses.dataclass
class Point:
    x: "decimal.Decimal"
def points(n):
    for i in range(n): yield Point(decimal.Decimal(i))
def fill(target): target[:] = [0]
"""
    test = """
import copy, dataclasses, decimal, pickle
def test_points():
    found = list(points(2))
    assert found[1] == copy.deepcopy(found[1]) == pickle.loads(pickle.dumps(found[1]))
    assert isinstance(found[1].x, decimal.Decimal) and dataclasses.replace(found[1], x=2).x == 2
    items = [1, 2]
    fill(items)
    assert items == [0] and next(points(1)).x == 0
"""
    assert box.run(code, [test]) == sandbox.Verdict("pass")


# ------------------------------------------------------------------------- what is restored


OWN = "class Own:\n    def __init__(self, n): self.n = n + 1\ndef make(n): return Own(n)\n"
LOOK = [
    "def test_own():\n    import math, unittest\n"
    "    unittest.TestCase().assertTrue(math.isclose(make(3).n, 3))",
    "def test_own():\n    import unittest\n    unittest.TestCase().assertAlmostEqual(make(3).n, 3)",
    "def test_own():\n    assert all(make(n).n == n for n in range(3))",
]


@pytest.mark.parametrize(
    "patch",
    [
        "import math; math.isclose = lambda *a, **k: True",
        "import unittest; unittest.TestCase.assertTrue = lambda *a: None",
        "import unittest; unittest.case.round = lambda *a: 0",
        "import unittest.case as u; u.TestCase.assertTrue = u.unittest = lambda *a: None",
        "del __import__('math').isclose, __builtins__['bool']\nisclose = bool = print",
        "import builtins; builtins.AssertionError = builtins.__import__ = print",
        "import sys; sys.modules['math'] = sys.modules['unittest'] = print",
        "def isclose(*a, **k): return True\nassertTrue = all = isclose",
    ],
)
def test_modules_are_restored_before_the_test(box, patch):
    """Stops a wrong program from passing because it patched what the test relies on.

    The right one has to pass, patched or not: what is restored works again.
    """
    for test in LOOK:
        assert box.run(OWN + patch, test).reason.startswith("AssertionError: ")
    assert box.run(OWN.replace("n + 1", "n") + patch, LOOK).passed


def test_long_reasons_arrive(box):
    """Stops a program from ending the zygote by a reason that does not fit the pipe."""
    code = "def f():\n    return type('\U0001f600' * 300, (), {})()"
    assert box.run(code, ["def test_f():\n    raise ValueError(f())"]).reason[:12] == "ValueError: "
    assert box.run(code, ["def test_f():\n    f().x"]).status == "fail"


def test_verdicts_of_another_form_do_not_count(box):
    """Stops a program that finds the random number from breaking the harness by what it sends."""
    code = """
import os, sys
frame = sys._getframe()
while "nonce" not in frame.f_locals: frame = frame.f_back
for fd in range(3, 64):
    try: os.write(fd, str(frame.f_locals["nonce"]).encode() + WORD)
    except OSError: pass
"""
    for word in ("b''", "b' '", "b' timeout'", r"b' win\xff\n'", "b' ' * 4000"):
        verdict = box.run(code.replace("WORD", word), TESTS)
        assert verdict == sandbox.Verdict("fail", "ended without a verdict")
    verdict = box.run(code.replace("WORD", r"b' fail \x1b\xff\ud800' + b'A' * 4000"), TESTS)
    assert verdict.status == "fail" and len(verdict.reason) == 300 and verdict.reason.isprintable()


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

    def passes(jobs):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda job: box.run(**job).passed, jobs))

    passes(jobs)
    fds, memory, threads = usage()
    assert passes(jobs * 4) == [True, False, False] * 80
    assert usage()[0] == fds and usage()[2] == threads and not leftovers(box)
    assert usage()[1] - memory < 10 << 20


def test_the_default_pool():
    """Stops an incompatible change of `sandbox.run`, which other programs call."""
    assert sandbox.run(RIGHT, TESTS).passed
    assert sandbox.run(RIGHT, TESTS, timeout=5.0, setup="", entry_point=None).status == "pass"
    assert sandbox.run("successor = None", TESTS).status == "fail"
    assert len(sandbox.default().workers) == 2


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
