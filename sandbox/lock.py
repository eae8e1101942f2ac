"""The lock: what a forked process gives up before it runs untrusted code. Linux x86_64 only.

    rlimits        memory (private and mapped), CPU time, file size, descriptors, core dumps
    capabilities   all dropped, so root is a user without powers
    Landlock       read Python, the system's libraries and a few files; write in one directory
    seccomp        no new process, exec, signal, socket, lasting IPC, change of mode, owner or limit

It cannot be undone; threads inherit it. Landlock also stops a process from looking into one under
another lock or none (ptrace, /proc/PID/mem, environ, fd). What is denied is listed; calls newer
than the list and x32 calls, whose numbers differ, fail with ENOSYS, and a 32-bit call kills.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
import sys

# System calls that fail with EPERM. Not listed: those that need a capability (mount, reboot, ...).
DENIED = dict(
    fork=57, vfork=58, execve=59, execveat=322, ptrace=101, setsid=112, setpgid=109, kill=62,
    tkill=200, tgkill=234, rt_sigqueueinfo=129, rt_tgsigqueueinfo=297, pidfd_open=434,
    pidfd_getfd=438, pidfd_send_signal=424, kcmp=312, process_vm_readv=310, process_vm_writev=311,
    process_madvise=440, process_mrelease=448, socket=41, connect=42, bind=49, listen=50,
    sendmsg=46, sendmmsg=307, shmget=29, shmat=30, shmctl=31, semget=64, semop=65, semctl=66,
    semtimedop=220, msgget=68, msgsnd=69, msgrcv=70, msgctl=71, mq_open=240, mq_unlink=241,
    memfd_create=319, memfd_secret=447, io_uring_setup=425, io_uring_enter=426,
    io_uring_register=427, bpf=321, perf_event_open=298, userfaultfd=323, add_key=248,
    request_key=249, keyctl=250, unshare=272, setns=308, personality=135, modify_ldt=154, prctl=157,
    setrlimit=160, setpriority=141, ioprio_set=251, sched_setparam=142, sched_setscheduler=144,
    sched_setaffinity=203, sched_setattr=314, migrate_pages=256, move_pages=279, setxattr=188,
    lsetxattr=189, fsetxattr=190, removexattr=197, lremovexattr=198, fremovexattr=199,
    name_to_handle_at=303, open_by_handle_at=304, fanotify_init=300, sync=162, syncfs=306,
)  # fmt: skip
# Calls that do nothing and seem to succeed: Landlock does not cover them, shutil.copy needs them.
IGNORED = dict(
    chmod=90, fchmod=91, fchmodat=268, fchmodat2=452, chown=92, fchown=93, lchown=94, fchownat=260,
    utime=132, utimes=235, futimesat=261, utimensat=280,
)  # fmt: skip
CLONE, CLONE3, FCNTL, IOCTL, PRLIMIT64, SENDTO = 56, 435, 72, 16, 302, 44  # depend on an argument
LAST_KNOWN, CLONE_THREAD = 462, 0x10000  # mseal; a flag of clone
FCNTL_DENIED = dict(F_SETOWN=8, F_SETSIG=10, F_SETOWN_EX=15, F_SETLEASE=1024, F_NOTIFY=1026)
IOCTL_ALLOWED = dict(TCGETS=0x5401, FIONBIO=0x5421, FIONCLEX=0x5450, FIOCLEX=0x5451)
AUDIT_ARCH_X86_64 = 0xC000003E
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS = 0x7FFF0000, 0x50000, 0x80000000
SECCOMP_NR, SECCOMP_ARCH, SECCOMP_ARGS = 0, 4, 16  # offsets in struct seccomp_data
BPF_LD, BPF_JEQ, BPF_JGE, BPF_JSET, BPF_RET = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF opcodes
SYS_PRCTL = 157 if platform.machine() == "x86_64" else 167  # aarch64, with --unsafe only
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
SYS_CAPSET, CAPABILITY_VERSION_3 = 126, 0x20080522
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_RULE_PATH_BENEATH, FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR = 1, 2, 4, 8
FS_ALL = (1 << 15) - 1  # execute ... truncate (ABI 3); later ABIs add what seccomp denies here
READABLE = """
    /usr /lib /lib64 /etc/ld.so.cache /etc/localtime /etc/passwd /etc/nsswitch.conf /etc/mime.types
    /dev/null /dev/zero /dev/random /dev/urandom /proc/self /proc/cpuinfo /proc/meminfo
    /sys/devices/system/cpu
""".split()
RESERVED = 1 << 30  # bytes of address space that libraries reserve and do not use

libc = ctypes.CDLL(None, use_errno=True)


def syscall(number, *args):
    """Make a system call by its number. Raises OSError if it fails."""
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in (number, *args)]
    result = libc.syscall(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def seccomp_filter():
    """The BPF program, struct sock_filter[]. A jump skips `yes` or `no` instructions."""
    allow = BPF_RET, SECCOMP_RET_ALLOW, 0, 0  # (code, k, yes, no)
    deny = BPF_RET, SECCOMP_RET_ERRNO | errno.EPERM, 0, 0
    ignore = BPF_RET, SECCOMP_RET_ERRNO, 0, 0
    absent = BPF_RET, SECCOMP_RET_ERRNO | errno.ENOSYS, 0, 0
    half = [(BPF_LD, SECCOMP_ARGS + 4 * i, 0, 0) for i in range(12)]  # low, high of each argument
    fcntl = [step for k in FCNTL_DENIED.values() for step in ((BPF_JEQ, k, 0, 1), deny)]
    ioctl = [step for k in IOCTL_ALLOWED.values() for step in ((BPF_JEQ, k, 0, 1), allow)]
    rules = dict.fromkeys(DENIED.values(), [deny]) | dict.fromkeys(IGNORED.values(), [ignore])
    rules |= {
        CLONE3: [absent],  # its flags are in memory, out of sight; libc then uses clone
        CLONE: [half[0], (BPF_JSET, CLONE_THREAD, 1, 0), deny, allow],
        # allow if argument i is 0: a limit is only read; asyncio's socketpair needs no address
        PRLIMIT64: [half[4], (BPF_JEQ, 0, 0, 2), half[5], (BPF_JEQ, 0, 1, 0), deny, allow],
        SENDTO: [half[8], (BPF_JEQ, 0, 0, 2), half[9], (BPF_JEQ, 0, 1, 0), deny, allow],
        FCNTL: [half[2], *fcntl, allow],
        IOCTL: [half[2], *ioctl, deny],
    }
    program = [
        (BPF_LD, SECCOMP_ARCH, 0, 0),
        (BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0),
        (BPF_RET, SECCOMP_RET_KILL_PROCESS, 0, 0),  # a 32-bit call
        (BPF_LD, SECCOMP_NR, 0, 0),
        (BPF_JGE, LAST_KNOWN + 1, 0, 1),  # newer than this list, or x32 (0x40000000 and up)
        absent,
    ]
    for number, body in rules.items():
        program += [(BPF_JEQ, number, 0, len(body)), *body]
    program.append(allow)
    return b"".join(struct.pack("=HBBI", code, yes, no, k) for code, k, yes, no in program)


def lock(directory, memory, cpu, unsafe=False):
    """Lock this process to `directory`, `memory` more bytes and `cpu` seconds, or raise OSError."""
    with open("/proc/self/statm") as file:
        size, *_, data, _ = [int(n) * resource.getpagesize() for n in file.read().split()]
    limits = dict(CPU=cpu, FSIZE=64 << 20, NOFILE=256, CORE=0, MSGQUEUE=0)
    limits["DATA"] = data + memory
    limits["AS"] = size + memory + RESERVED  # counts shared maps, which DATA does not
    for name, limit in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    if not unsafe:  # unsafe: with these limits only
        drop_permissions(directory)


def drop_permissions(directory):
    """Capabilities, then Landlock, then seccomp, which would forbid the first two."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "the numbers here are those of x86_64")
    syscall(SYS_CAPSET, struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    syscall(SYS_PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # An older Landlock does not know all of FS_ALL and refuses it.
    ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, struct.pack("=Q", FS_ALL), 8, 0)
    readable = [*READABLE, sys.prefix, sys.base_prefix, *sys.path]
    paths = dict.fromkeys(readable, FS_READ_FILE | FS_READ_DIR)
    paths["/dev/null"] |= FS_WRITE_FILE
    paths[directory] = FS_ALL
    for path, allowed in paths.items():
        with contextlib.suppress(FileNotFoundError, PermissionError):  # not there: needs no rule
            fd = os.open(path, os.O_PATH)
            if not os.path.isdir(path):
                allowed &= ~FS_READ_DIR  # the kernel refuses it for a file
            rule = struct.pack("=Qi", allowed, fd)
            syscall(SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
            os.close(fd)
    syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    program = ctypes.create_string_buffer(FILTER, len(FILTER))
    header = struct.pack("@HP", len(FILTER) // 8, ctypes.addressof(program))  # struct sock_fprog
    syscall(SYS_PRCTL, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


FILTER = seccomp_filter()
