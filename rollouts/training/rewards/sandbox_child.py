"""In the child: give up every right that a test program does not need, then run it. Linux; standard library only.

    python -I sandbox_child.py '{"memory_bytes": ..., "cpu_s": ..., "file_bytes": ...}' FD    program: ./program.py

It prints nothing itself. Once every restriction is in place, and before the program runs, it writes a byte into file
descriptor FD and closes it. Where a restriction fails, it ends with the reason on stderr instead.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

EPERM, ENOSYS = 1, 38
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
CLONE_THREAD = 0x10000
# fcntl's F_SETOWN, F_SETSIG, F_SETOWN_EX: a pipe that sends any signal to any process; F_SETLEASE and F_NOTIFY, which
# hold up or watch others' use of a file that may only be read; F_SETPIPE_SZ, memory that RLIMIT_AS does not count.
FCNTL_REFUSED = (8, 10, 15, 1024, 1026, 1031)
# ioctl's TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Others change a file's flags, which takes no more
# than reading it, or speak to devices.
IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
TRUNCATE_ABI = 3  # of Landlock; the levels before know nothing of truncate(2) on a path

# machine -> (its number in audit.h, the numbers of its system calls)
MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "clone": 56,
            "clone3": 435,
            "capset": 126,
            "fcntl": 72,
            "ioctl": 16,
            "prctl": 157,
            "truncate": 76,
        },
        {
            "memfd_create": 319,
            "inotify_init": 253,
            "inotify_init1": 294,
            "inotify_add_watch": 254,
            "fanotify_init": 300,
            "io_setup": 206,
            "syslog": 103,
            "fork": 57,
            "vfork": 58,
            "socket": 41,
            "kill": 62,
            "tkill": 200,
            "tgkill": 234,
            "rt_sigqueueinfo": 129,
            "rt_tgsigqueueinfo": 297,
            "ptrace": 101,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "unshare": 272,
            "setns": 308,
            "setrlimit": 160,
            "prlimit64": 302,
            "perf_event_open": 298,
            "userfaultfd": 323,
            "bpf": 321,
            "chmod": 90,
            "fchmod": 91,
            "fchmodat": 268,
            "chown": 92,
            "fchown": 93,
            "lchown": 94,
            "fchownat": 260,
            "socketpair": 53,
            "shmget": 29,
            "shmat": 30,
            "shmctl": 31,
            "semget": 64,
            "semop": 65,
            "semctl": 66,
            "semtimedop": 220,
            "msgget": 68,
            "msgsnd": 69,
            "msgrcv": 70,
            "msgctl": 71,
            "mq_open": 240,
            "mq_unlink": 241,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "setpriority": 141,
            "sched_setparam": 142,
            "sched_setscheduler": 144,
            "sched_setaffinity": 203,
            "sched_setattr": 314,
            "ioprio_set": 251,
            "migrate_pages": 256,
            "move_pages": 279,
            "utime": 132,
            "utimes": 235,
            "futimesat": 261,
            "utimensat": 280,
            "setxattr": 188,
            "lsetxattr": 189,
            "fsetxattr": 190,
            "removexattr": 197,
            "lremovexattr": 198,
            "fremovexattr": 199,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220,
            "clone3": 435,
            "capset": 91,
            "fcntl": 25,
            "ioctl": 29,
            "prctl": 167,
            "truncate": 45,
        },
        {
            "memfd_create": 279,
            "inotify_init1": 26,
            "inotify_add_watch": 27,
            "fanotify_init": 262,
            "io_setup": 0,
            "syslog": 116,
            "socket": 198,
            "kill": 129,
            "tkill": 130,
            "tgkill": 131,
            "rt_sigqueueinfo": 138,
            "rt_tgsigqueueinfo": 240,
            "ptrace": 117,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "unshare": 97,
            "setns": 268,
            "setrlimit": 164,
            "prlimit64": 261,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "bpf": 280,
            "fchmod": 52,
            "fchmodat": 53,
            "fchown": 55,
            "fchownat": 54,
            "socketpair": 199,
            "shmget": 194,
            "shmat": 196,
            "shmctl": 195,
            "semget": 190,
            "semop": 193,
            "semctl": 191,
            "semtimedop": 192,
            "msgget": 186,
            "msgsnd": 189,
            "msgrcv": 188,
            "msgctl": 187,
            "mq_open": 180,
            "mq_unlink": 181,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "setpriority": 140,
            "sched_setparam": 118,
            "sched_setscheduler": 119,
            "sched_setaffinity": 122,
            "sched_setattr": 274,
            "ioprio_set": 30,
            "migrate_pages": 238,
            "move_pages": 239,
            "utimensat": 88,
            "setxattr": 5,
            "lsetxattr": 6,
            "fsetxattr": 7,
            "removexattr": 14,
            "lremovexattr": 15,
            "fremovexattr": 16,
        },
    ),
}
EVERYWHERE = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "pidfd_open": 434,
    "process_madvise": 440,
    "memfd_secret": 447,
    "fchmodat2": 452,
    "setxattrat": 463,
    "removexattrat": 466,
    "file_setattr": 469,
}  # the same on every machine

LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def limit_resources(*, memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)  # the user's limit may be lower, and cannot be raised
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (allowed, allowed))


def drop_capabilities(machine: str) -> None:
    """Drop the rights that make root more than the owner of its files."""
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    check(LIBC.syscall(MACHINES[machine][1]["capset"], header, bytes(24)), "capset")


def restrict_files(writable: str) -> int:
    """Allow (by Landlock) to read Python and the system's libraries, and to write into `writable`.

    Return the kernel's level; 0: none.
    """
    create, add, restrict = 444, 445, 446
    version = LIBC.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return 0
    execute, write_file, read_file, read_dir = 1 << 0, 1 << 1, 1 << 2, 1 << 3
    everything = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14
    rules = check(
        LIBC.syscall(create, struct.pack("Q", everything), ctypes.c_size_t(8), 0),
        "landlock_create_ruleset",
    )
    packages = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    readable = packages | {
        sys.prefix,
        sys.base_prefix,
        "/usr",
        "/lib",
        "/lib64",
        "/etc/localtime",
        "/dev/urandom",
    }
    allowed = {path: execute | read_file | read_dir for path in readable}
    for path, access in {
        **allowed,
        "/dev/null": read_file | write_file,
        writable: everything,
    }.items():
        if os.path.exists(path):
            directory = os.path.isdir(path)
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack(
                "=Qi",
                access if directory else access & (execute | write_file | read_file),
                descriptor,
            )
            check(LIBC.syscall(add, rules, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(descriptor)
    check(LIBC.syscall(restrict, rules, 0), "landlock_restrict_self")
    os.close(rules)
    return int(version)


def filter_system_calls(machine: str, landlock: int) -> None:
    """Refuse (by seccomp) system calls that reach beyond the process, or change rights, priorities or attributes.

    Refused are new processes, sockets, signals to others and reading them, watching files, and memory, queues or keys
    that outlive the process or escape its limit; truncate(2) too where the `landlock` level does not know it. Threads
    are allowed.
    """
    audit, calls, denied = MACHINES[machine]
    # BPF: LD|W|ABS, JEQ, JSET, JGE, RET
    load, equal, any_bit, at_least, answer = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # the x32 interface has other numbers
        program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse | EPERM)]
    shortening = (calls["truncate"],) if 0 < landlock < TRUNCATE_ABI else ()
    for number in (*denied.values(), *EVERYWHERE.values(), *shortening):
        program += [(equal, 0, 1, number), (answer, 0, 0, refuse | EPERM)]
    # libc then uses clone
    program += [(equal, 0, 1, calls["clone3"]), (answer, 0, 0, refuse | ENOSYS)]
    program += [(equal, 0, 2 + 2 * len(FCNTL_REFUSED), calls["fcntl"]), (load, 0, 0, 24)]
    for command in FCNTL_REFUSED:
        program += [(equal, 0, 1, command), (answer, 0, 0, refuse | EPERM)]
    program += [(answer, 0, 0, allow)]
    program += [(equal, 0, 2 + 2 * len(IOCTL_ALLOWED), calls["ioctl"]), (load, 0, 0, 24)]
    for request in IOCTL_ALLOWED:
        program += [(equal, 0, 1, request), (answer, 0, 0, allow)]
    program += [(answer, 0, 0, refuse | EPERM)]
    # The signal at the parent's death stays set
    program += [(equal, 0, 4, calls["prctl"]), (load, 0, 0, 16), (equal, 0, 1, PR_SET_PDEATHSIG)]
    program += [(answer, 0, 0, refuse | EPERM), (answer, 0, 0, allow)]
    program += [(equal, 0, 3, calls["clone"]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD)]
    program += [(answer, 0, 0, refuse | EPERM), (answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    )
    check(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def main() -> None:
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    try:
        machine = platform.machine()
        if sys.platform != "linux" or machine not in MACHINES:
            raise OSError(
                f"{sys.platform} on {machine}: needs Linux on one of {', '.join(MACHINES)}"
            )
        check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
        check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        landlock = restrict_files(os.getcwd())
        drop_capabilities(machine)
        limit_resources(**json.loads(sys.argv[1]))
        filter_system_calls(machine, landlock)
    except OSError as error:
        sys.exit(str(error))
    os.write(int(sys.argv[2]), b"!")
    os.close(int(sys.argv[2]))
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
