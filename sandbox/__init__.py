"""Run model-written Python against tests on Linux x86_64, and protect the machine from it.

    verdict = sandbox.run("def inc(x): return x + 1", ["def test():\\n    assert inc(1) == 2"])
    verdict.passed, verdict.status, verdict.reason      # True, "pass", ""

    with sandbox.Sandbox(preload=("numpy", "torch"), memory=4 << 30) as box:
        verdict = box.run(code, tests, setup="import numpy as np")

A test is source code that defines functions test_*, each of which is called. With `entry_point` it
defines check(candidate) instead, which gets the program's object of that name. Each test has a new
process, which runs `setup`, which is trusted, the program, then the test. A name in the test means
the test's or setup's own, then a builtin, then the program's.

    pass, fail, timeout    the program's result; its output and exit status do not count
    error                  not its fault: setup, the test or the harness is broken

A zygote (zygote.py) imports the libraries once, in an empty environment, and forks a locked process
(lock.py) for each test, which judge.py runs. The harness has its own deadline and replaces a zygote
that misses it. Without Landlock (ABI 3: Linux 6.2) or seccomp nothing runs, unless unsafe=True.

This is not a true security sandbox. The lock protects the machine; nothing protects the verdict
from a program that sets out to fool its test, because both share a process: e.g. it patches
`math.isclose` when it is called, or answers with an object whose __eq__ is always true.

Not covered: reading (Python, its packages, /usr, /etc/passwd; name, size and dates of other files);
CPU, memory and disk use within the limits; time and load as a channel; kernel bugs. Threads and
disk can exceed their limits for 50 ms. Honest programs cannot use child processes, sockets, or
their own files outside the working directory. Tested on Linux 6.18 with Python 3.11, as root and as
a normal user; not in Docker as a normal user. aarch64, macOS and Windows are refused.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import time
import warnings

from sandbox.zygote import remove

GRACE = 20  # seconds that a zygote may be late before it is replaced
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START = f"import sys; sys.path.insert(0, {ROOT!r}); from sandbox import zygote; zygote.serve()"
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ENVIRONMENT |= {"MALLOC_ARENA_MAX": "2", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # huge pages: a fork is 2 ms faster


class Unavailable(RuntimeError):
    """This system cannot contain a program, so none is run."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    status: str  # pass, fail, timeout, error
    reason: str = ""  # printable, at most 300 characters

    @property
    def passed(self):
        return self.status == "pass"


class Worker:
    """A zygote, started when it is needed and replaced when it fails."""

    def __init__(self, settings):
        self.settings = settings
        self.process = None

    def start(self):
        self.home = tempfile.mkdtemp(prefix="sandbox-")
        self.pipe, end = multiprocessing.Pipe()
        paths = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-c", START, str(end.fileno())], env=paths | ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[end.fileno()],
            cwd=self.home, start_new_session=True,
        )  # fmt: skip
        end.close()
        if self.exchange(self.settings | {"home": self.home}, 300) != ["pass", ""]:
            self.stop()
            why = "cannot contain a program without Landlock (Linux 6.2) and seccomp"
            raise Unavailable(f"sandbox: {why}, see above; --unsafe runs it anyway")

    def exchange(self, message, seconds):
        """Send a message and return the reply, or None if the zygote was late or died: it ends."""
        reply = None
        try:
            with contextlib.suppress(OSError, EOFError):
                self.pipe.send_bytes(json.dumps(message).encode())
                if self.pipe.poll(seconds):
                    reply = json.loads(self.pipe.recv_bytes())
        finally:
            if reply is None:  # after Ctrl-C, too: a late reply would be taken for the next test's
                self.stop()
        return reply

    def stop(self):
        """End the zygote and the test that it runs, and delete its directory."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.process = None
        self.pipe.close()
        deadline = time.monotonic() + 2
        remove(self.home)
        while os.path.exists(self.home) and time.monotonic() < deadline:
            time.sleep(0.02)  # a test, killed by PR_SET_PDEATHSIG, may take a moment to end
            remove(self.home)


class Sandbox(contextlib.AbstractContextManager):
    """Workers that run programs. `memory` is in bytes, on top of what the libraries take."""

    def __init__(self, preload=(), workers=2, memory=1 << 30, unsafe=False):
        if sys.platform != "linux":
            raise Unavailable("sandbox: only Linux on x86_64 can contain a program")
        if unsafe:
            warnings.warn("sandbox: UNSAFE, programs run with all your permissions", stacklevel=2)
        settings = {"preload": list(preload), "memory": memory, "unsafe": unsafe}
        self.workers = [Worker(settings) for _ in range(workers)]
        self.idle = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def run(self, code, tests, setup="", entry_point=None, timeout=15.0):
        """The Verdict on one program: pass if every test passes, each within `timeout` seconds."""
        job = {"code": code, "setup": setup, "entry_point": entry_point, "timeout": timeout}
        verdict = Verdict("error", "no tests")
        worker = self.idle.get()
        try:
            for test in [tests] if isinstance(tests, str) else tests:
                if worker.process is None:
                    worker.start()
                reply = worker.exchange((job, test), timeout + GRACE)
                verdict = Verdict(*(reply or ("error", "the zygote died and was replaced")))
                if not verdict.passed:
                    break
        finally:
            self.idle.put(worker)
        return verdict

    def __exit__(self, *_):
        for worker in self.workers:
            worker.stop()


@functools.cache
def default():
    return Sandbox()


def run(code, tests, setup="", entry_point=None, timeout=15.0):
    """Sandbox.run on workers that start at the first call and end with this process."""
    return default().run(code, tests, setup, entry_point, timeout)
