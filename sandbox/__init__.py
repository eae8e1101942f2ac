"""Run untrusted Python against tests on Linux x86_64: protect the machine, give an honest verdict.

    verdict = sandbox.run("def inc(x): return x + 1", ["def test():\\n    assert inc(1) == 2"])
    verdict.passed, verdict.status, verdict.reason, verdict.judge      # True, "pass", "", "split"

    with sandbox.Sandbox(preload=("numpy", "torch"), memory=4 << 30, judge="auto") as box:
        verdicts = list(box.map([{"code": code, "tests": tests, "setup": setup}, ...]))

A test is source code that defines functions test_*, each of which is called. With `entry_point` it
defines check(candidate) instead, which gets the program's function of that name. Each test runs in
new processes: first `setup`, which is trusted, then the program or the test. A name in the test
means the test's or setup's own, then a builtin, then the program's. So names that a prompt defines
and a test uses belong in `setup`.

    pass, fail, timeout    the program's result; its output and exit status do not count
    error                  not its fault: setup, the test or the harness is broken

A zygote (zygote.py) imports the libraries once, in an empty environment. For each test it forks the
program's process, then the judge's (judge.py), whose memory alone holds the test and a nonce. Both
are locked (lock.py). The judge calls the program over a wire for plain values (wire.py). It alone
holds the verdict pipe, and a verdict counts only with the nonce. Then every process is killed and
collected, every file deleted. The harness has its own deadline and replaces a zygote that misses
it. Without Landlock (ABI 3: Linux 6.2) or seccomp nothing runs, unless unsafe=True.

judge="split" (default) fails what no wire carries: instances of own classes, DataFrames, sympy.
judge="auto" judges such tests again, program and test in one process. The verdict then says
"in-process": weaker evidence, to be counted separately.

Not covered: reading (Python, its packages, /usr, /etc/passwd; name, size and dates of other files);
CPU, memory and disk use within the limits; time and load as a channel; kernel bugs; programs that
guess what is tested; with "in-process", programs that know judge.py. Threads and disk are checked
every 50 ms and can exceed their limits in between. The lock also stops honest programs from using
child processes, multiprocessing, sockets, and their own files outside the working directory.
Tested on Linux 6.18 (Landlock ABI 7) with Python 3.11, as root and as a normal user. Not tested:
Docker as a normal user, other kernels. aarch64, macOS and Windows are refused.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

from sandbox.wire import Broken, read, write
from sandbox.zygote import remove

GRACE = 20  # seconds that a zygote may be late before it is replaced
# The project's root is on the zygote's path, and so readable, only while it imports zygote.py.
START = (
    "import sys; sys.path.insert(0, sys.argv.pop()); from sandbox import zygote; "
    "del sys.path[0]; zygote.serve()"
)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ENVIRONMENT |= {"MALLOC_ARENA_MAX": "2", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # huge pages: a fork is 2 ms faster


class Unavailable(RuntimeError):
    """This system cannot contain a program, so none is run."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    status: str  # pass, fail, timeout, error
    reason: str = ""  # printable, at most 300 characters
    judge: str = "split"  # "in-process" if at least one test had to be judged so

    @property
    def passed(self):
        return self.status == "pass"


class Worker:
    """A zygote, started when it is needed and replaced when it fails."""

    def __init__(self, preload, unsafe):
        self.settings = {"preload": list(preload), "unsafe": unsafe}
        self.process = None

    def start(self):
        self.home = tempfile.mkdtemp(prefix="sandbox-")
        paths = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-c", START, ROOT], env=paths | ENVIRONMENT, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self.home, start_new_session=True,
        )  # fmt: skip
        settings = self.settings | {"home": self.home}
        if self.exchange(300, json.dumps(settings).encode()) != 0:
            self.stop()
            reason = "this system cannot contain a program, see above; --unsafe runs it anyway"
            raise Unavailable(f"sandbox: {reason}")

    def exchange(self, seconds, *messages):
        """Send messages and return the reply, or None if the zygote is too late or dies."""
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        try:
            for message in messages:
                write(self.process.stdin.fileno(), message)
            return json.loads(read(self.process.stdout.fileno()))
        except (OSError, Broken):
            return None
        finally:
            timer.cancel()

    def run(self, job, test):
        """(status, reason, doubt) of one test."""
        if self.process is None:
            self.start()
        messages = pickle.dumps(job), test.encode("utf-8", "surrogatepass")
        reply = None
        try:
            reply = self.exchange(job["timeout"] + GRACE, *messages)
        finally:
            if reply is None:  # after Ctrl-C, too: a late reply would be taken for the next test's
                self.stop()
        return reply or ("error", "the zygote died and was replaced", "")

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self):
        """End the zygote and the test that it runs, and delete its directory."""
        if self.process is None:
            return
        self.kill()
        self.process.communicate()
        self.process = None
        for _ in range(100):  # its children, killed by PR_SET_PDEATHSIG, may take a moment to end
            with contextlib.suppress(OSError):
                return remove(self.home)
            time.sleep(0.02)


class Sandbox(contextlib.AbstractContextManager):
    """Workers that run programs. `memory` is in bytes, on top of what the libraries take."""

    def __init__(self, preload=(), workers=2, memory=1 << 30, judge="split", unsafe=False):
        if sys.platform != "linux":
            raise Unavailable("sandbox: only Linux on x86_64 can contain a program")
        if judge not in ("split", "auto"):
            raise ValueError(f"judge: {judge!r} is neither 'split' nor 'auto'")
        if unsafe:
            warnings.warn("sandbox: UNSAFE, programs run with all your permissions", stacklevel=2)
        self.memory = memory
        self.judge = judge
        self.workers = [Worker(preload, unsafe) for _ in range(workers)]
        self.idle = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def run(self, code, tests, setup="", entry_point=None, timeout=15.0):
        """The Verdict on one program: pass if every test passes, each within `timeout` seconds."""
        job = {"code": code, "setup": setup, "entry_point": entry_point, "timeout": timeout}
        job |= {"memory": self.memory, "joint": False}
        verdict, judge = Verdict("error", "no tests"), "split"
        worker = self.idle.get()
        try:
            for test in [tests] if isinstance(tests, str) else tests:
                status, reason, doubt = worker.run(job, test)
                if doubt and status == "fail" and self.judge == "auto":
                    status, reason, _ = worker.run(job | {"joint": True}, test)
                    judge = "in-process"
                verdict = Verdict(status, reason, judge)
                if not verdict.passed:
                    break
        finally:
            self.idle.put(worker)
        return verdict

    def map(self, jobs):
        """Verdicts of many programs (dicts of run's arguments), in order, on all workers."""
        with ThreadPoolExecutor(len(self.workers)) as pool:
            yield from pool.map(lambda job: self.run(**job), jobs)

    def close(self):
        for worker in self.workers:
            worker.stop()

    def __exit__(self, *_):
        self.close()


@functools.cache
def default():
    box = Sandbox()
    atexit.register(box.close)
    return box


def run(code, tests, setup="", entry_point=None, timeout=15.0):
    """Sandbox.run on workers that start at the first call and stop when Python exits."""
    return default().run(code, tests, setup, entry_point, timeout)
