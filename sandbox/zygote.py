"""The zygote: serve() imports the libraries once, then forks a locked process for every test.

Threads and disk, which the kernel cannot limit per program, are checked every 50 ms.
"""

import contextlib
import gc
import importlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection

from sandbox.judge import describe, judge
from sandbox.lock import SYS_PRCTL, lock, syscall

THREADS, FILES, DISK = 256, 5000, 128 << 20  # limits of one program; DISK in bytes
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def spawn(job, test, directory, nonce, pipe):
    """Fork a locked process that runs a test and writes `nonce` and the verdict to `pipe`."""
    parent = os.getpid()
    if os.fork():
        return
    try:
        os.setsid()
        syscall(SYS_PRCTL, PR_SET_PDEATHSIG, signal.SIGKILL)
        os.closerange(3, pipe)
        os.closerange(pipe + 1, 1 << 16)
        os.chdir(directory)
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        lock(directory, job["memory"], int(job["timeout"] * os.cpu_count()) + 2, job["unsafe"])
        if os.getppid() == parent:  # it may have died before PR_SET_PDEATHSIG
            status, reason = judge(job, test)
            os.write(pipe, f"{nonce} {status} {reason}".encode(errors="replace"))  # < PIPE_BUF
    except BaseException as error:
        os.write(2, f"sandbox: {describe(error)}\n".encode())  # visible only from serve()'s probe
    finally:
        os._exit(0)


def run_test(job, test):
    """(status, reason) of one test: fork its process, wait, leave nothing behind."""
    directory = tempfile.mkdtemp(dir=job["home"])
    deadline = time.monotonic() + job["timeout"]
    nonce = secrets.randbits(128)  # no string: a program may write all that it finds to all pipes
    reads, writes = os.pipe()
    spawn(job, test, directory, nonce, writes)
    os.close(writes)
    try:
        return wait(reads, str(nonce), deadline, directory)
    finally:
        reap()
        os.close(reads)
        remove(directory)


def wait(fd, nonce, deadline, directory):
    """The verdict, if it has the nonce, is in time and the program keeps its limits."""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], min(0.05, left))[0]:
            text = os.read(fd, select.PIPE_BUF).decode(errors="replace")
            clean = "".join(char if char.isprintable() else "?" for char in text)
            word, status, reason, *_ = [*clean.split(" ", 2), "", ""]
            if word == nonce and status in ("pass", "fail", "error"):
                return status, reason[:300]
            return "fail", "ended without a verdict"
        if reason := excess(directory):
            return "fail", reason
    return "timeout", "no verdict in time"


def children():
    with open("/proc/thread-self/children") as file:
        return file.read().split()


def excess(directory):
    """The limit on threads, files or disk that the program exceeds, or ""."""
    count = size = 0
    for pid in children():
        with contextlib.suppress(OSError):  # a process that is ending shows no files
            if os.stat(f"/proc/{pid}/task").st_nlink - 2 > THREADS:
                return "too many threads"
            files = [os.stat(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            size += sum(file.st_blocks * 512 for file in files if file.st_nlink == 0)  # deleted
    todo = [directory]
    while todo and count <= FILES:
        try:
            for entry in os.scandir(todo.pop()):
                count += 1
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
        except FileNotFoundError:  # deleted in the meantime
            continue
        except OSError as error:  # an unreadable directory, a path that is too long
            return f"files out of sight: {error.strerror}"
    if count > FILES:
        return "too many files"
    return "too much on disk" if size > DISK else ""


def reap():
    """Kill and collect all descendants. Orphans come here, too (PR_SET_CHILD_SUBREAPER)."""
    while pids := children():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def remove(directory):
    """Delete a tree of any depth and modes, on which shutil.rmtree gives up."""
    try:
        os.rmdir(directory)  # most are empty
    except OSError:
        subprocess.run(["chmod", "-Rf", "700", directory])
        subprocess.run(["rm", "-rf", directory])


def serve():
    """Import the libraries, report whether the lock works, run tests until the harness ends."""
    del sys.path[0]  # the project's root: what stays on the path can be read by programs
    pipe = Connection(int(sys.argv.pop()))
    settings = json.loads(pipe.recv_bytes())
    for name in settings["preload"]:
        with contextlib.suppress(Exception):  # not installed: programs that need it fail
            importlib.import_module(name)
    syscall(SYS_PRCTL, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()  # no collection in a fork copies the pages of these objects
    probe = settings | {"code": "", "setup": "", "entry_point": None, "timeout": 60}
    pipe.send_bytes(json.dumps(run_test(probe, "def test_nothing(): pass")).encode())
    os.dup2(0, 2)  # /dev/null
    with contextlib.suppress(EOFError, OSError):  # the harness has closed its end
        while True:
            job, test = json.loads(pipe.recv_bytes())
            pipe.send_bytes(json.dumps(run_test(job | settings, test)).encode())
    remove(settings["home"])
