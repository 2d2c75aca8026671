"""What holds a proposal in: limits of the kernel, and a hook in the interpreter that says what was tried.

Linux. Layers, outermost first; :func:`confine` says which are in force:

* resource limits: memory, processor time, size of files, no core files;
* namespaces: no network, no view of other processes' shared memory (where the kernel lets this user have them);
* Landlock: writing only below the own folder, no TCP (kernel 5.13 / 6.7 and later);
* an audit hook: no opening for writing outside the folder, no sockets, no other programs, no loading of libraries.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any

_CLONE_NEWNET, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x40000000, 0x08000000, 0x10000000
# x86-64 and arm64 have the same numbers.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_QUERY, _PATH_BENEATH, _NO_NEW_PRIVILEGES = 1, 1, 38
# Landlock's rights to change files: write, remove, make of every kind, refer (ABI 2), truncate (ABI 3), ioctl (ABI 5).
_WRITES = {1: (1 << 1) | sum(1 << bit for bit in range(4, 13)), 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_TCP = (1 << 0) | (1 << 1)  # bind, connect (ABI 4)
_FORBIDDEN_EVENTS = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.putenv",
    "signal.",
    "shutil.",
    "sys.addaudithook",
    "sys.setprofile",
    "sys.settrace",
)
_CHANGING_EVENTS = ("chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate", "utime")


def limit_resources(*, seconds: int, memory_bytes: int, file_bytes: int = 1 << 20) -> None:
    """Limits that a process cannot raise again. ``memory_bytes`` is of the address space."""
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, 0),  # no further process; root is exempt, the hook is not
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def confine(folder: Path) -> list[str]:
    """Hold this process in: it may write below ``folder`` only and reach no network.

    Returns:
        the layers that are in force, in words.
    """
    layers = shut_in(folder)
    _hook(str(folder.resolve()) + os.sep)
    return [*layers, "audit hook"]


def shut_in(folder: Path) -> list[str]:
    """The kernel's layers of :func:`confine` alone: for programs that may do anything within their folder."""
    library = ctypes.CDLL(None, use_errno=True)
    layers = []
    if _without_network(library):
        layers.append("no network (namespace)")
    if (version := _landlock(library, folder)) > 0:
        layers.append(f"writes below its own folder only (Landlock ABI {version})")
    return layers


def _without_network(library: ctypes.CDLL) -> bool:
    """A network namespace with nothing in it; as another user in a user namespace where root's right is lacking."""
    wanted = _CLONE_NEWNET | _CLONE_NEWIPC
    return library.unshare(wanted) == 0 or library.unshare(wanted | _CLONE_NEWUSER) == 0


def _landlock(library: ctypes.CDLL, folder: Path) -> int:
    """The ABI in force, 0 where the kernel has none."""
    version = library.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_QUERY)
    if version < 1:
        return 0
    rights = sum(bits for since, bits in _WRITES.items() if since <= version)
    fields = [rights, _TCP] if version >= 4 else [rights]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = library.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    below = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        rule = struct.pack("=Qi", rights, below)
        if ruleset < 0 or library.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) != 0:
            return 0
        library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        return int(version) if library.syscall(_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(below)
        if ruleset >= 0:
            os.close(ruleset)


def _hook(inside: str) -> None:
    def below(path: Any) -> bool:
        text = os.fsdecode(path) if isinstance(path, str | bytes) else ""
        return (os.path.realpath(text) + os.sep).startswith(inside)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = (*args, None, 0)[:3]
            writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
            writes = writes or bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and not below(path):
                raise PermissionError(f"a family file may not write {path!r}")
        elif event.startswith("os.") and event.removeprefix("os.") in _CHANGING_EVENTS:
            if not below(args[0]):
                raise PermissionError(f"a family file may not change {args[0]!r} ({event})")
        elif event.startswith(_FORBIDDEN_EVENTS):
            raise PermissionError(f"a family file may not do {event} {args[:2]!r}")

    sys.addaudithook(audit)
