"""Whether an answer equals a reference: plain comparison first, math-verify for what that leaves open.

math-verify bounds its own time with SIGALRM, which works in main threads only and does not interrupt a huge integer
power. It therefore runs in one child process for all calls, which is killed and restarted when it is late.
"""

import atexit
import json
import re
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

TIMEOUT_S = 10.0  # for one pair; the child's own limit is shorter
START_S = 120.0  # importing sympy on a busy machine
MAX_CHARS = 2000
MEMORY_BYTES = 4 << 30

_NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")


def normalised(text: str) -> str:
    """Lower case, single spaces, without surrounding `$` or quotes and without a final full stop."""
    text = " ".join(text.split()).strip().casefold()
    for _ in range(2):
        text = text.rstrip(".").strip()
        for mark in ('"', "'", "$", "`"):
            if len(text) > 1 and text[0] == text[-1] == mark:
                text = text[1:-1].strip()
    return text


def quick(reference: str, answer: str) -> bool | None:
    """Equality by plain means; None when only mathematics can tell."""
    a, b = normalised(reference), normalised(answer)
    if a == b:
        return True
    if _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b):
        return float(a.replace(",", "")) == float(b.replace(",", ""))
    # Plain words are not mathematics: "red" never equals "crimson", whatever a parser makes of the letters.
    if len(answer) > MAX_CHARS or not any(c.isdigit() or c in "\\^=+*/<>{}" for c in a):
        return False
    return None


def equivalent(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """For each (reference, answer): are they equal? One that cannot be compared in time is not. For any thread."""
    found = [quick(reference, answer) for reference, answer in pairs]
    return [f if f is not None else _child.ask(*pair) for f, pair in zip(found, pairs, strict=True)]


class _Child:
    """The process that runs `serve`: asked one pair at a time, a JSON line each way."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, reference: str, answer: str) -> bool:
        with self._lock:
            try:
                process = self._process or self._start()
                assert process.stdin is not None
                process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
                return bool(_read(process, TIMEOUT_S))
            except (OSError, ValueError):
                self.stop()
                return False

    def _start(self) -> subprocess.Popen:
        # -P: run as a file, this folder must not be on the path; its text.py and others would hide top-level modules.
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([sys.executable, "-P", __file__], bufsize=0, **pipes)
        _read(self._process, START_S)
        return self._process

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _read(process: subprocess.Popen, seconds: float) -> bool:
    """The next line that the child says. Raises TimeoutError, which is an OSError, when it is late."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            raise TimeoutError
    return json.loads(process.stdout.readline())


_child = _Child()
atexit.register(_child.stop)


def serve() -> None:
    """The child: read [reference, answer] lines from stdin, write true or false to stdout, until stdin closes."""
    import logging
    import resource
    import signal

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    # A tower of powers must fail here, not take the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("true", flush=True)
    for line in sys.stdin:
        # Should the parent die meanwhile, the kernel ends a child that is stuck in C code.
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * TIMEOUT_S)
        # LaTeX is only recognised between dollars.
        pair = [f"${text}$" if "\\" in text and "$" not in text else text for text in json.loads(line)]
        try:
            equal = verify(*(parse(text, parsing_timeout=3) for text in pair), timeout_seconds=3)
        except Exception:
            # The answer is the policy's free text: whatever it breaks in the parser, it is not equal.
            equal = False
        print(json.dumps(bool(equal)), flush=True)


if __name__ == "__main__":
    serve()
