"""What runs on the way into the sandbox, started by ``sandbox.py`` with ``python -I -S -c``: standard library alone.

Arguments: a JSON object with ``memory``, ``seconds``, ``files``, ``processes``; the number of the file descriptor that
takes what happened, which becomes 3. Standard input holds the program. No exception leaves a half-made sandbox: the
program is only reached by the last line.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
RELATIME, NOATIME = 1 << 21, 1024
DETACH = 2
PDEATHSIG, NO_NEW_PRIVS = 1, 38
ROOT = "/tmp"
USER, NOBODY = 1000, 65533

RUNNER = """
import sys
program = sys.stdin.read()
try:
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
except BaseException as error:
    with open(3, "w", errors="replace") as said:
        said.write((type(error).__name__ + ": " + str(error))[:300])
else:
    with open(3, "w") as said:
        said.write("passed")
"""


def fail(what: str) -> NoReturn:
    """Say why there is no sandbox, and end."""
    os.write(3, f"sandbox: {what}".encode())
    os._exit(3)


libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: Any) -> None:
    """A function of the C library that gives 0."""
    if not hasattr(libc, name):
        fail(f"the system's library has no {name}")
    if getattr(libc, name)(*args) != 0:
        fail(f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def put(path: str) -> None:
    """Make a folder of the system visible below ROOT, not to be written to."""
    target = ROOT + path
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if not os.path.isdir(path):
        return
    os.makedirs(target, exist_ok=True)
    mount(path, target, None, BIND | REC)
    # What the outer mount forbids must stay forbidden, else the kernel refuses.
    known = os.statvfs(path).f_flag
    kept = (known & os.ST_NOSUID and NOSUID) | (known & os.ST_NODEV and NODEV) | (known & os.ST_NOEXEC and NOEXEC)
    kept |= (known & os.ST_RELATIME and RELATIME) | (known & os.ST_NOATIME and NOATIME)
    mount(None, target, None, BIND | REMOUNT | RDONLY | NOSUID | kept)


def inside(limits: dict[str, int], python: str, prefix: str) -> NoReturn:
    """The last steps, in the process that becomes the program's."""
    mount(None, "/", None, REC | PRIVATE)
    mount("none", ROOT, "tmpfs", NOSUID | NODEV, f"size={limits['files']},nr_inodes=4096,mode=755")
    done: list[str] = []
    for path in ("/usr", "/lib", "/lib64", "/bin", prefix):
        if not any(path == before or path.startswith(before + "/") for before in done):
            put(path)
            done.append(path)
    for name in ("/old", "/home"):
        os.mkdir(ROOT + name)
    os.chdir(ROOT)
    call("pivot_root", b".", b"old")
    os.chdir("/")
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    os.chdir("/home")
    for name, value in (
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_CPU", limits["seconds"]),
        ("RLIMIT_FSIZE", limits["files"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))
    if os.getuid() == 0:
        # As root the program's processes would count against no limit, and it could mount.
        os.chown("/home", NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    # A user other than 0 loses every capability with this, those of its own namespace too.
    os.execve(
        python, [python, "-I", "-S", "-c", RUNNER], {"PATH": "/usr/bin:/bin", "HOME": "/home", "LC_ALL": "C.UTF-8"}
    )


def main() -> NoReturn:
    """Namespaces, then the process that is number 1 in them."""
    limits = json.loads(sys.argv[1])
    os.dup2(int(sys.argv[2]), 3)
    uid, gid = os.getuid(), os.getgid()
    own = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    call("unshare", own if uid == 0 else own | NEWUSER)
    try:
        maps = (("setgroups", "deny"), ("uid_map", f"{USER} {uid} 1"), ("gid_map", f"{USER} {gid} 1"))
        for name, text in maps if uid else ():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        child = os.fork()
        if child == 0:
            call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            inside(limits, os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix))
    except OSError as error:
        fail(f"{error.strerror} {error.filename or ''}".strip())
    os.close(3)
    _, status = os.waitpid(child, 0)
    os._exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
