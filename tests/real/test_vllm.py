"""What needs a real vLLM: the tests of inside/, by the interpreter of an environment that has one.

R1V_TEST_VLLM names its folder; environment.py makes it, or is still at it (`.ci/run` starts it beside the other tests).
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MADE_S = 900.0  # that making the environment may take
RUN_S = 1200.0  # of all tests in inside/; about 180 CPU seconds, most of them imports and starts

pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def interpreter() -> str:
    if not os.environ.get("R1V_TEST_VLLM"):
        pytest.skip("R1V_TEST_VLLM names no environment; python tests/real/environment.py DIR makes one (4 GB)")
    folder = Path(os.environ["R1V_TEST_VLLM"])
    end = time.monotonic() + MADE_S
    while not (folder / "made-from").is_file():
        if (folder / "failed").is_file():
            pytest.skip(f"the environment of vLLM could not be made: {(folder / 'failed').read_text()}")
        if time.monotonic() > end:
            pytest.skip(f"the environment of vLLM was not made within {MADE_S:.0f} s")
        time.sleep(1)
    return str(folder / "bin" / "python")


def test_inside(interpreter):
    """All in one process, which imports torch and vLLM once."""
    command = [interpreter, "-m", "pytest", "-o", "addopts=", "-q", "-rs", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a server's processes would compile vLLM's sources once more each
    ran = subprocess.run(
        [*command, "--durations=12", HERE / "inside"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_S,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    print(ran.stdout[-2000:])
