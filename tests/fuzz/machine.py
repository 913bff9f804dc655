"""A machine that refuses: places that cannot be written, full disks, no memory, no open files; each in a fork."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
from collections.abc import Callable
from pathlib import Path

from . import evals, values
from .harness import Case
from .recipes import GRPO, dumped

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACE, _PRIVATE, _READ_ONLY = 0x20000, 0x44000, 1


def _mount(folder: str, options: str, flags: int = 0) -> None:
    """A small file system of this process's own at `folder`."""
    Path(folder).mkdir()
    failed = (
        _LIBC.unshare(_NEW_NAMESPACE)
        or _LIBC.mount(b"none", b"/", None, _PRIVATE, None)
        or _LIBC.mount(b"none", folder.encode(), b"tmpfs", flags, options.encode())
    )
    if failed:
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}")


def read_only() -> None:
    _mount("ro", "size=64k", _READ_ONLY)


def full() -> None:
    _mount("full", "size=64k")
    try:
        Path("full/filler").write_bytes(b"x" * 200_000)
    except OSError:
        return


def nearly_full() -> None:
    _mount("part", "size=24k")


def limited(kind: int, number: int) -> None:
    resource.setrlimit(kind, (number, number))


def memory(more: int) -> None:
    """`more` bytes of address space beyond what there is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limited(resource.RLIMIT_AS, pages * resource.getpagesize() + more)


@functools.cache
def mounts() -> bool:
    """Whether this machine lets us mount."""
    if not (pid := os.fork()):
        try:
            os.chdir("/tmp")
            _LIBC.unshare(_NEW_NAMESPACE) and os._exit(1)
            _LIBC.mount(b"none", b"/", None, _PRIVATE, None) and os._exit(1)
            os._exit(_LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, b"size=64k") != 0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


_FILES = {
    "r.yaml": dumped(GRPO | {"rewards": [{"name": "format"}]}),
    "judged.json": values.as_json(evals.JUDGED),
    "p.json": values.as_json(evals.PREDICTED),
    "q.json": values.as_json(evals.ASKED),
    "f": b"a file",
} | evals.FIGURES
WRITE = {
    "copy": ["recipes", "copy", "grpo/tiny", "OUT"],
    "prepare": ["prepare-data", "shapes", "--limit", "4", "--out", "OUT", "--json"],
    "grpo": ["grpo", "--recipe", "r.yaml", "--run-dir", "OUT"],
    "sft": ["sft", "--recipe", "sft/tiny", "--run-dir", "OUT"],
    "judged": ["eval-hallusion", "--judged", "judged.json", "--out", "OUT", "--json"],
    "predicted": ["eval-hallusion", "--predictions", "p.json", "--out", "OUT", "--json"],
    "report": ["report", "run", "--out", "OUT", "--json"],
    "merge": ["merge", "ckpt", "--out", "OUT", "--json"],
    "generate": ["eval-hallusion", "ckpt", "--questions", "q.json", "--images", "fig", "--out", "OUT", "--json",
                 "--max-new-tokens", "2", "--max-empty", "100"],
}  # fmt: skip
LOOK = {
    "list": ["recipes", "list"],
    "show": ["recipes", "show", "grpo/tiny", "--json"],
    "dry run": ["grpo", "--recipe", "r.yaml", "--dry-run", "--json"],
    "doctor": ["doctor"],
    "estimate": ["eval-hallusion", "ckpt", "--questions", "q.json", "--images", "fig", "--estimate", "--json"],
}
SLOW = ("report", "merge", "generate", "doctor", "estimate")  # seconds each: the bench runs them
NOWHERE = ("/proc/x", "/proc/self/x", "/sys/x", "/dev/null/x", "/dev/full", "f/x", "f", "x" * 300)
NO_CACHE = ("f", "f/x", "/proc/x")
LIMITS = {
    "files of 0 bytes": (resource.RLIMIT_FSIZE, 0),
    "files of 1000 bytes": (resource.RLIMIT_FSIZE, 1000),
    "files of 100,000 bytes": (resource.RLIMIT_FSIZE, 100_000),
    **{f"{n} open files": (resource.RLIMIT_NOFILE, n) for n in (6, 9, 12, 16, 24)},
}


def _case(
    name: str, argv: list[str], base: Path, machine: Callable[[], None] | None = None, out: str = "out", **env: str
) -> Case:
    keeps = ("out", ".out", "part", "full", "ro", "fig") if out == "out" else ("part", "full", "ro")
    argv = [out if a == "OUT" else a for a in argv]
    return Case(name, argv, dict(_FILES), base, env=env, machine=machine, codes=(0, 2), keeps=keeps)


def cases(base: Path, *, slow: bool) -> list[Case]:
    """All commands on all machines; `base` holds a run dir `run` and a model `ckpt`. Those of `SLOW` only where asked."""
    write = {k: v for k, v in WRITE.items() if slow or k not in SLOW}
    every = write | {k: v for k, v in LOOK.items() if slow or k not in SLOW}
    places = dict.fromkeys(NOWHERE)
    machines: dict[str, Callable[[], None] | None] = {
        name: functools.partial(limited, *limit) for name, limit in LIMITS.items()
    }
    machines |= {f"{more >> 20} MiB": functools.partial(memory, more) for more in (0, 1 << 20, 8 << 20, 64 << 20)}
    caches = [(c, None) for c in NO_CACHE]
    if mounts():
        places |= {"ro/x": read_only, "full/x": full, "part/x": nearly_full}  # type: ignore[dict-item]
        caches += [("ro/c", read_only), ("full/c", full)]  # type: ignore[list-item]
    found = [_case(f"{k} to {o[:20]}", a, base, m, o) for o, m in places.items() for k, a in write.items()]
    found += [_case(f"{k}, cache {c}", a, base, m, R1V_CACHE=c) for c, m in caches for k, a in every.items()]
    found += [_case(f"{k}, no home", a, base, R1V_CACHE="", HOME="/proc") for k, a in every.items()]
    found += [_case(f"{k}, no TMPDIR", a, base, TMPDIR="/nowhere") for k, a in every.items()]
    return found + [_case(f"{k}, {name}", a, base, m) for name, m in machines.items() for k, a in every.items()]
