"""Run untrusted Python against tests, on Linux x86_64: the machine stays whole, the verdict stays honest.

    verdict = sandbox.run("def double(x): return 2 * x", ["def test_two():\\n    assert double(1) == 2"])
    verdict.passed, verdict.status, verdict.reason, verdict.judge      # True, "pass", "", "split"

    with sandbox.Sandbox(preload=("numpy", "torch"), memory=4 << 30, judge="auto") as box:
        verdicts = list(box.map([{"code": code, "tests": tests, "setup": setup}, ...]))

A test is a source that defines functions test_*, each of which is called, or, with `entry_point`, a source
that defines check(candidate), which gets the program's function of that name. Every test runs in fresh
processes: `setup` (trusted), then the program or the test. A name in the test is the test's or setup's own,
then a builtin, and only then the program's: what a prompt defines and a test uses belongs into `setup`.

    pass, fail, timeout    what the program earned; its output and exit status count for nothing
    error                  not its fault: setup or test are broken, or the harness is

How. A zygote (zygote.py), exec'd with an empty environment, imports the libraries once. For each test it
forks the program's process and then the judge's (judge.py), in whose memory alone are test and nonce. Both
are locked (lock.py). The judge calls the program over a wire that carries plain values (wire.py), and alone
holds the pipe for the verdict, which counts only with the nonce. Then all is killed, collected and deleted.
The harness has its own deadline and replaces a zygote that misses it. Where Landlock (ABI 3: Linux 6.2) or
seccomp is missing nothing runs, unless unsafe=True.

judge="split", the default, fails what no wire carries (instances of own classes, DataFrames, sympy).
judge="auto" judges such tests again with program and test in one process and the verdict says
"in-process": weaker evidence, to be counted apart.

Not covered: what may be read (Python, its packages, /usr, /etc/passwd; of other files the name, size and
dates), use of CPU, memory and disk within the limits, time and load as a channel, bugs of the kernel, a
program that guesses what is tested; and with "in-process" a program that knows judge.py. Threads and disk
are looked at every 50 ms: a program may exceed them for as long. What the lock forbids, honest programs
miss, too: child processes, multiprocessing, sockets, files of their own elsewhere than in the working
directory. Tried on Linux 6.18 (Landlock ABI 7) with Python 3.11, as root and as a normal user. Not tried:
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

GRACE = 20  # seconds that a zygote may answer late, before it is replaced
# The project's root is on the zygote's path, and hence readable, only while it imports zygote.py.
START = (
    "import sys; sys.path.insert(0, sys.argv.pop()); from sandbox import zygote; "
    "del sys.path[0]; zygote.serve()"
)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Unavailable(RuntimeError):
    """This system cannot contain a program, so none is run."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    status: str  # pass, fail, timeout, error
    reason: str = ""  # printable, at most 300 characters
    judge: str = "split"  # or "in-process", where at least one test had to be judged so

    @property
    def passed(self):
        return self.status == "pass"


class Worker:
    """A zygote and what it takes to replace it."""

    def __init__(self, preload, unsafe):
        self.preload, self.unsafe, self.process = list(preload), unsafe, None

    def start(self):
        self.home = tempfile.mkdtemp(prefix="sandbox-")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        environment = kept | threads | {"MALLOC_ARENA_MAX": "2", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # huge pages: less for a fork to copy, 2 ms less
        command = [sys.executable, "-P", "-B", "-c", START, ROOT]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=self.home,
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        settings = {"preload": self.preload, "unsafe": self.unsafe, "home": self.home}
        if self.exchange(300, json.dumps(settings).encode()) != 0:
            self.stop()
            raise Unavailable("sandbox: this system cannot contain a program, see above; --unsafe runs it all the same")

    def exchange(self, seconds, *messages):
        """Send messages, return the reply; None if the zygote does not answer in time or dies."""
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
        try:
            messages = pickle.dumps(job), test.encode("utf-8", "surrogatepass")
            reply = self.exchange(job["timeout"] + GRACE, *messages)
        except BaseException:  # Ctrl-C: its answer would be taken for the next test's
            self.stop()
            raise
        if reply is None:
            self.stop()
        return reply or ("error", "the zygote died and was replaced", "")

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self):
        """End the zygote, and the test that it runs, and delete its directory."""
        if self.process is not None:
            self.kill()
            self.process.communicate()
            self.process = None
            for _ in range(100):  # the kernel kills the zygote's children (PR_SET_PDEATHSIG), but need not be done
                with contextlib.suppress(OSError):
                    return remove(self.home)
                time.sleep(0.02)


class Sandbox:
    """Workers that run programs. `memory` is in bytes, above what the zygote's libraries take; see the docstring."""

    def __init__(self, preload=(), workers=2, memory=1 << 30, judge="split", unsafe=False):
        if sys.platform != "linux":
            raise Unavailable("sandbox: only Linux on x86_64 can contain a program")
        if judge not in ("split", "auto"):
            raise ValueError(f"judge: {judge!r} is neither 'split' nor 'auto'")
        if unsafe:
            warnings.warn("sandbox: UNSAFE, model-written code runs with all of your rights", stacklevel=2)
        self.memory, self.judge, self.workers = memory, judge, [Worker(preload, unsafe) for _ in range(workers)]
        self.idle = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def run(self, code, tests, setup="", entry_point=None, timeout=15.0):
        """The Verdict on one program: pass if every test passes, each within `timeout` seconds."""
        job = {"code": code, "setup": setup, "entry_point": entry_point, "timeout": timeout, "memory": self.memory}
        verdict, judge = Verdict("error", "no tests"), "split"
        worker = self.idle.get()
        try:
            for test in [tests] if isinstance(tests, str) else tests:
                status, reason, doubt = worker.run(job | {"joint": False}, test)
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
        """Verdicts of many programs (dicts of run's arguments), in order, on all workers at once."""
        with ThreadPoolExecutor(len(self.workers)) as pool:
            yield from pool.map(lambda job: self.run(**job), jobs)

    def close(self):
        for worker in self.workers:
            worker.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@functools.cache
def default():
    box = Sandbox()
    atexit.register(box.close)
    return box


def run(code, tests, setup="", entry_point=None, timeout=15.0):
    """Sandbox.run on a pool that is started at the first call and closed when Python exits."""
    return default().run(code, tests, setup, entry_point, timeout)
