"""The lock: what a forked process gives up for good before it runs untrusted code. Linux x86_64 only.

    rlimits        memory (private and mapped), CPU time, size of a file, descriptors, core dumps
    capabilities   all dropped, so that root is a user without powers
    Landlock       read Python, the system's libraries and a few files; write in one directory only
    seccomp        no process, exec, signal, socket, IPC that stays, change of modes, owners or limits

About 1 ms. Nothing of it can be undone, and every thread and child would inherit it. Landlock also keeps
a process from looking into one with another lock or none (ptrace, /proc/PID/mem, environ, fd).

A list of what is denied lets honest programs live, but must be complete: calls newer than the list do
not exist for the program (ENOSYS), nor do 32-bit and x32 calls, which have other numbers.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
import sys

# What needs a capability (mount, reboot, mknod of devices, ...) is not listed: all capabilities are dropped.
DENIED = {  # answered with EPERM
    "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "ptrace": 101, "setsid": 112, "setpgid": 109,
    "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
    "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "kcmp": 312,
    "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "process_mrelease": 448,
    "socket": 41, "connect": 42, "bind": 49, "listen": 50, "sendmsg": 46, "sendmmsg": 307,
    "shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220,
    "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241,
    "memfd_create": 319, "memfd_secret": 447, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250,
    "unshare": 272, "setns": 308, "personality": 135, "modify_ldt": 154, "prctl": 157, "setrlimit": 160,
    "setpriority": 141, "ioprio_set": 251, "sched_setparam": 142, "sched_setscheduler": 144,
    "sched_setaffinity": 203, "sched_setattr": 314, "migrate_pages": 256, "move_pages": 279,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300, "sync": 162, "syncfs": 306,
}  # fmt: skip
IGNORED = {  # seem to succeed and do nothing: Landlock does not cover them, and shutil.copy needs them
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94,
    "fchownat": 260, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
}  # fmt: skip
CLONE, CLONE3, FCNTL, IOCTL, PRLIMIT64, SENDTO, LAST_KNOWN = 56, 435, 72, 16, 302, 44, 462  # mseal is the last
CLONE_THREAD = 0x10000
FCNTL_DENIED = {"F_SETOWN": 8, "F_SETSIG": 10, "F_SETOWN_EX": 15, "F_SETLEASE": 1024, "F_NOTIFY": 1026}
IOCTL_ALLOWED = {
    "TCGETS": 0x5401, "TIOCGWINSZ": 0x5413, "FIONREAD": 0x541B, "FIONBIO": 0x5421, "FIONCLEX": 0x5450,
    "FIOCLEX": 0x5451,
}  # fmt: skip
AUDIT_ARCH_X86_64 = 0xC000003E
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
BPF_LD, BPF_JEQ, BPF_JGE, BPF_JSET, BPF_RET = 0x20, 0x15, 0x35, 0x45, 0x06  # the classic BPF opcodes used below
SECCOMP_NR, SECCOMP_ARCH, SECCOMP_ARGS = 0, 4, 16  # offsets in struct seccomp_data
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
PR_SET_NO_NEW_PRIVS = 38
SYS_CAPSET, CAPABILITY_VERSION_3 = 126, 0x20080522
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_CREATE_RULESET_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1
FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR, FS_MAKE_CHAR, FS_MAKE_SOCK, FS_MAKE_BLOCK = 2, 4, 8, 64, 512, 2048
FS_ALL, FS_IOCTL_DEV = (1 << 15) - 1, 1 << 15  # execute ... truncate (ABI 3); ioctl on devices (ABI 5)
NET_BIND_CONNECT_TCP, SCOPE_ABSTRACT_UNIX_SOCKET_AND_SIGNAL = 3, 3  # ABI 4; ABI 6
READABLE = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/nsswitch.conf",
    "/etc/mime.types", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/proc/self", "/proc/cpuinfo",
    "/proc/meminfo", "/sys/devices/system/cpu",
)  # fmt: skip
FILE_SIZE, DESCRIPTORS, RESERVED = 64 << 20, 256, 1 << 30  # bytes of one file; open files; bytes reserved, not used

libc = ctypes.CDLL(None, use_errno=True)


def syscall(number, *args):
    """A system call by number; OSError if it fails."""
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option, *args):
    """The same for prctl(2)."""
    if libc.prctl(option, *(ctypes.c_ulong(a) if isinstance(a, int) else a for a in args)) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def seccomp_filter():
    """The BPF program, as struct sock_filter[]: DENIED, IGNORED and the calls that depend on an argument."""
    deny, ignore, allow = SECCOMP_RET_ERRNO | errno.EPERM, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW
    absent = SECCOMP_RET_ERRNO | errno.ENOSYS
    program = []

    def emit(code, k, yes=0, no=0):  # a jump skips `yes` or `no` instructions
        program.append(struct.pack("=HBBI", code, yes, no, k))

    def rule(number, *body):  # if the call is `number`, run `body`, which must end in BPF_RET
        emit(BPF_JEQ, number, 0, len(body))
        for instruction in body:
            emit(*instruction)

    def argument(i, high=False):
        return BPF_LD, SECCOMP_ARGS + 8 * i + 4 * high

    def unless_zero(i):  # allow if argument i is 0, else deny
        return argument(i), (BPF_JEQ, 0, 0, 2), argument(i, high=True), (BPF_JEQ, 0, 1, 0), (BPF_RET, deny)

    emit(BPF_LD, SECCOMP_ARCH)
    emit(BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0)
    emit(BPF_RET, SECCOMP_RET_KILL_PROCESS)  # a 32-bit call
    emit(BPF_LD, SECCOMP_NR)
    emit(BPF_JGE, LAST_KNOWN + 1, 0, 1)  # newer than this list, or x32 (0x40000000 and up)
    emit(BPF_RET, absent)
    for number in DENIED.values():
        rule(number, (BPF_RET, deny))
    for number in IGNORED.values():
        rule(number, (BPF_RET, ignore))
    rule(CLONE3, (BPF_RET, absent))  # its flags lie in memory, out of sight; libc then takes clone
    rule(CLONE, argument(0), (BPF_JSET, CLONE_THREAD, 1, 0), (BPF_RET, deny), (BPF_RET, allow))
    rule(PRLIMIT64, *unless_zero(2), (BPF_RET, allow))  # reading limits is fine, setting them is not
    rule(SENDTO, *unless_zero(4), (BPF_RET, allow))  # an address: asyncio's own socketpair needs none
    test = [jump for k in FCNTL_DENIED.values() for jump in ((BPF_JEQ, k, 0, 1), (BPF_RET, deny))]
    rule(FCNTL, argument(1), *test, (BPF_RET, allow))
    test = [jump for k in IOCTL_ALLOWED.values() for jump in ((BPF_JEQ, k, 0, 1), (BPF_RET, allow))]
    rule(IOCTL, argument(1), *test, (BPF_RET, deny))
    emit(BPF_RET, allow)
    return b"".join(program)


def lock(directory, memory, cpu, unsafe=False):
    """Lock this process: writes in `directory` only, `memory` more bytes than now, `cpu` seconds. OSError: it cannot.

    `unsafe` leaves it at the rlimits.
    """
    with open("/proc/self/statm") as file:
        size, *_, data, _ = (int(pages) * resource.getpagesize() for pages in file.read().split())
    limits = {
        "AS": size + memory + RESERVED,  # counts shared maps, which DATA does not
        "DATA": data + memory, "CPU": cpu, "FSIZE": FILE_SIZE, "NOFILE": DESCRIPTORS, "CORE": 0, "MSGQUEUE": 0,
    }  # fmt: skip
    for name, limit in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    if not unsafe:
        drop_rights(directory)


def drop_rights(directory):
    """Capabilities, then Landlock, then seccomp, which would forbid the first two."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "the numbers here are those of x86_64")
    syscall(SYS_CAPSET, struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24))  # root without its powers
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    abi = syscall(SYS_LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    if abi < 3:
        raise OSError(errno.ENOSYS, f"Landlock ABI {abi}, 3 is needed")
    rights = FS_ALL | FS_IOCTL_DEV * (abi >= 5)
    net, scope = NET_BIND_CONNECT_TCP * (abi >= 4), SCOPE_ABSTRACT_UNIX_SOCKET_AND_SIGNAL * (abi >= 6)
    ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, struct.pack("=QQQ", rights, net, scope), 24, 0)
    paths = dict.fromkeys([*READABLE, sys.prefix, sys.base_prefix, *sys.path], FS_READ_FILE | FS_READ_DIR)
    paths["/dev/null"] |= FS_WRITE_FILE
    paths[directory] = rights & ~(FS_MAKE_CHAR | FS_MAKE_BLOCK | FS_MAKE_SOCK)
    for path, allowed in paths.items():
        with contextlib.suppress(FileNotFoundError, PermissionError):  # what is not there needs no rule
            fd = os.open(path, os.O_PATH)
            allowed &= ~FS_READ_DIR if not os.path.isdir(path) else -1  # the kernel wants it so
            syscall(SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, struct.pack("=Qi", allowed, fd), 0)
            os.close(fd)
    syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    program = ctypes.create_string_buffer(FILTER, len(FILTER))
    header = struct.pack("@HP", len(FILTER) // 8, ctypes.addressof(program))  # struct sock_fprog
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


FILTER = seccomp_filter()
