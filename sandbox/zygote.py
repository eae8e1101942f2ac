"""The zygote: the helper process that forks, for every test, the program's process and the judge's.

    serve()     import the libraries once, then run the tests that come over stdin until it closes

It runs nothing of the program itself. What it must not do is hand the program's process anything to cheat
with: the test is read after that process is forked, the nonce drawn after the last fork, and both are gone
from its memory before the next program comes. Threads and disk, for which the kernel has no limit by
program, are looked at every 50 ms.
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
from sandbox.lock import lock, prctl
from sandbox.wire import Broken, Peer, describe, read, write

THREADS, FILES, DISK = 256, 5000, 128 << 20  # of one program; bytes on disk
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def spawn(body, directory, job, unsafe, *keep):
    """Fork a locked process that runs body() with the descriptors `keep` and no other."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for low, high in itertools.pairwise([2, *sorted(keep), 1 << 16]):
            os.closerange(low + 1, high)
        os.chdir(directory)
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        lock(directory, job["memory"], int(job["timeout"] * os.cpu_count()) + 2, unsafe)
        if os.getppid() == parent:
            body()
    except BaseException as error:
        os.write(2, f"sandbox: {describe(error)}\n".encode())  # seen at the start only, see serve()
        os._exit(1)
    finally:
        os._exit(0)


def run_test(jobs, job, home, unsafe):
    """Fork program and judge, wait for the verdict, leave nothing behind. Returns (status, reason, doubt)."""
    directory = tempfile.mkdtemp(dir=home)
    deadline = time.monotonic() + job["timeout"]
    pipes = ask, reply, secret, verdict = [os.pipe() for _ in range(4)]
    if not job["joint"]:
        peer = Peer(ask[0], reply[1], trusts=True)
        spawn(lambda: program(job, peer), directory, job, unsafe, ask[0], reply[1])
    test = read(jobs)  # only now, and the nonce after the last fork: no process finds them in its memory

    def judge():
        source = test.decode("utf-8", "surrogatepass")
        result = joint_judge(job, source) if job["joint"] else split_judge(job, source, Peer(reply[0], ask[1]))
        os.write(verdict[1], os.read(secret[0], 16) + json.dumps(result).encode())  # less than PIPE_BUF

    wire = () if job["joint"] else (reply[0], ask[1])
    spawn(judge, directory, job, unsafe, secret[0], verdict[1], *wire)
    nonce = secrets.token_bytes(16)
    os.write(secret[1], nonce)
    test[:] = bytes(len(test))
    for fd in {fd for pipe in pipes for fd in pipe} - {verdict[0]}:
        os.close(fd)
    try:
        return wait(verdict[0], nonce, deadline, directory)
    finally:
        reap()
        os.close(verdict[0])
        remove(directory)


def wait(fd, nonce, deadline, directory):
    """The judge's word, if it comes with the nonce and in time and the program stays within its limits."""
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
    """What of threads, files and bytes on disk is too much, or ""."""
    count = size = 0
    for pid in children():
        with contextlib.suppress(OSError):  # a process that is ending has no files that we may see
            if os.stat(f"/proc/{pid}/task").st_nlink - 2 > THREADS:
                return "too many threads"
            files = [os.stat(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            size += sum(file.st_blocks * 512 for file in files if file.st_nlink == 0)  # deleted, still open
    todo = [directory]
    while todo and count <= FILES:
        try:
            for entry in os.scandir(todo.pop()):
                count += 1
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
        except FileNotFoundError:  # deleted while we looked
            continue
        except OSError as error:  # a directory that cannot be read, a path that is too long
            return f"files out of sight: {error.strerror}"
    return "too many files" if count > FILES else "too much on disk" if size > DISK else ""


def reap():
    """Kill and collect all that descends from this process; orphans come here too (PR_SET_CHILD_SUBREAPER)."""
    while pids := children():
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        for pid in pids:
            os.waitpid(int(pid), 0)


def remove(directory):
    """Delete a tree of any depth, width and modes: what a subdirectory holds is moved up, then it is deleted."""
    with contextlib.suppress(FileNotFoundError):
        while entries := list(os.scandir(directory)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)  # moving a directory writes its "..", hence before it is moved
                for inner in list(os.scandir(entry.path)):
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner.path, 0o700)
                    os.rename(inner.path, f"{directory}/{secrets.token_hex(8)}")
                os.rmdir(entry.path)
        os.rmdir(directory)


def serve():
    """Import the libraries, say whether this system can lock a process, then run tests until stdin closes."""
    jobs, verdicts, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    settings = json.loads(read(jobs))
    for name in settings["preload"]:
        with contextlib.suppress(Exception):  # not installed: a program that needs it will fail
            importlib.import_module(name)
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()  # spares the forks' copies of every object's page
    home, unsafe = settings["home"], settings["unsafe"]
    probe = spawn(lambda: None, home, {"timeout": 1, "memory": 1 << 30}, unsafe)
    write(verdicts, json.dumps(os.waitstatus_to_exitcode(os.waitpid(probe, 0)[1])).encode())
    os.dup2(null, 2)
    with contextlib.suppress(Broken, BrokenPipeError):  # the harness has gone
        while True:
            job = pickle.loads(read(jobs))
            write(verdicts, json.dumps(run_test(jobs, job, home, unsafe)).encode())
    remove(home)
