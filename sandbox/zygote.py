"""The zygote: the process that forks, for every test, the program's process and the judge's.

    serve()     import the libraries once, then run the tests that come over stdin until it closes

It runs none of the program's code and gives the program's process nothing to cheat with: it reads
the test after it forks that process, draws the nonce after the last fork, and holds neither when
the next program comes. Threads and disk, which the kernel cannot limit per program, are checked
every 50 ms.
"""

import contextlib
import gc
import importlib
import itertools
import json
import os
import pickle
import secrets
import select
import signal
import tempfile
import time

from sandbox.judge import joint_judge, program, split_judge
from sandbox.lock import SYS_PRCTL, lock, syscall
from sandbox.wire import Broken, Peer, describe, read, write

THREADS, FILES, DISK = 256, 5000, 128 << 20  # limits of one program; DISK in bytes
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def spawn(body, directory, job, *keep):
    """Fork a locked process that runs body() with the descriptors `keep` and no others."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        syscall(SYS_PRCTL, PR_SET_PDEATHSIG, signal.SIGKILL)
        for low, high in itertools.pairwise([2, *sorted(keep), 1 << 16]):
            os.closerange(low + 1, high)
        os.chdir(directory)
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        lock(directory, job["memory"], int(job["timeout"] * os.cpu_count()) + 2, job["unsafe"])
        if os.getppid() == parent:  # it may have died before PR_SET_PDEATHSIG
            body()
    except BaseException as error:
        os.write(2, f"sandbox: {describe(error)}\n".encode())  # visible only from serve()'s probe
        os._exit(1)
    finally:
        os._exit(0)


def run_test(jobs, job):
    """(status, reason, doubt) of one test: fork program and judge, wait, leave nothing behind."""
    directory = tempfile.mkdtemp(dir=job["home"])
    deadline = time.monotonic() + job["timeout"]
    ask, reply, secret, verdict = [os.pipe() for _ in range(4)]
    if not job["joint"]:
        peer = Peer(ask[0], reply[1], trusts=True)
        spawn(lambda: program(job, peer), directory, job, ask[0], reply[1])
    test = read(jobs)  # only now: the program's process must not find it in its memory

    def judge():
        source = test.decode("utf-8", "surrogatepass")
        if job["joint"]:
            result = joint_judge(job, source)
        else:
            result = split_judge(job, source, Peer(reply[0], ask[1]))
        word = json.dumps(result, ensure_ascii=False).encode()  # shorter than PIPE_BUF
        os.write(verdict[1], os.read(secret[0], 16) + word)

    wire = () if job["joint"] else (reply[0], ask[1])
    spawn(judge, directory, job, secret[0], verdict[1], *wire)
    nonce = secrets.token_bytes(16)  # after the last fork
    os.write(secret[1], nonce)
    test[:] = bytes(len(test))
    for fd in (*ask, *reply, *secret, verdict[1]):
        os.close(fd)
    try:
        return wait(verdict[0], nonce, deadline, directory)
    finally:
        reap()
        os.close(verdict[0])
        remove(directory)


def wait(fd, nonce, deadline, directory):
    """The judge's verdict, if it has the nonce, is in time and the program keeps its limits."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(min(50, 1000 * left)):
            word = os.read(fd, select.PIPE_BUF)
            if word[:16] == nonce:
                return json.loads(word[16:])
            return "fail", "ended without a verdict", ""
        if reason := excess(directory):
            return "fail", reason, ""
    return "timeout", "no verdict in time", ""


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
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        for pid in pids:
            os.waitpid(int(pid), 0)


def remove(directory):
    """Delete a tree of any depth and modes: move up what a subdirectory holds, then delete it."""
    with contextlib.suppress(FileNotFoundError):
        while entries := list(os.scandir(directory)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for inner in list(os.scandir(entry.path)):
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner.path, 0o700)  # moving a directory writes its ".."
                    os.rename(inner.path, f"{directory}/{secrets.token_hex(8)}")
                os.rmdir(entry.path)
        os.rmdir(directory)


def serve():
    """Import the libraries, report whether the lock works, run tests until stdin closes."""
    jobs, verdicts, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    settings = json.loads(read(jobs))
    for name in settings["preload"]:
        with contextlib.suppress(Exception):  # not installed: programs that need it fail
            importlib.import_module(name)
    syscall(SYS_PRCTL, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()  # no collection in a fork copies the pages of these objects
    probe = spawn(lambda: None, settings["home"], settings | {"timeout": 1, "memory": 1 << 30})
    status = os.waitstatus_to_exitcode(os.waitpid(probe, 0)[1])
    write(verdicts, json.dumps(status).encode())
    os.dup2(null, 2)
    with contextlib.suppress(Broken, BrokenPipeError):  # the harness has closed its end
        while True:
            job = pickle.loads(read(jobs)) | settings
            write(verdicts, json.dumps(run_test(jobs, job)).encode())
    remove(settings["home"])
