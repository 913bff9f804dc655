"""r1v through its command line on a GPU: `python -m pytest -n 0 tests/gpu`. Skipped where there is none.

Random weights of the real classes; with R1V_GPU_REAL=FOLDER two shipped recipes at the published 3B's shapes too.
The tests of `tests/integration` use the GPU where there is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from tiny_models import draw_rows, save_tiny, write_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
REAL = os.environ.get("R1V_GPU_REAL")  # a folder for the published shapes' weights; without it those tests are skipped


def r1v(*args: str, cache: Path, ok: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "r1vfree_cli", *args],
        env=os.environ | {"R1V_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == ok, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def sets(**values) -> list[str]:
    """`--set` for each; `__` in a name stands for a dot."""
    return [part for k, v in values.items() for part in ("--set", f"{k.replace('__', '.')}={json.dumps(v)}")]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    save_tiny(root / "model")
    save_tiny(root / "judge", seed=1)
    (root / "data").mkdir()
    write_rows(root / "data", draw_rows(12))
    return root


def recipe(home: Path, **feedback) -> list[str]:
    judge = {"name": "feedback", "cache": False, "canaries": None, **feedback}
    return sets(
        model__name=str(home / "model"), model__min_pixels=784, model__max_pixels=56 * 56, data__path=str(home / "data"),
        data__heldout=None, data__max_prompt_tokens=200, rewards=[{"name": "format", "weight": 0.2}, judge],
        train__max_steps=4, train__save_steps=2, train__save_strategy="steps", train__prompts_per_device=2,
        train__num_generations=4, train__beta=0.04, train__learning_rate=1e-4, train__max_completion_length=12,
    )  # fmt: skip


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "preset, dtype", [("ddp", "float32"), ("ddp", "bfloat16"), ("zero2", "bfloat16"), ("zero3", "bfloat16")]
)
def test_grpo_with_a_judge_in_its_process_and_a_resume(home, tmp_path, preset, dtype):
    run = tmp_path / "run"
    base = [
        "grpo",
        "--recipe",
        "tiny",
        "--run-dir",
        str(run),
        *recipe(home, backend="local", model=str(home / "judge")),
    ]
    base += sets(launch={"preset": preset, "processes": 1}, model__dtype=dtype)
    r1v(*base, *sets(train__max_steps=2), cache=home / "cache")
    first = steps_of(run)
    r1v(*base, "--resume", cache=home / "cache")
    lines = steps_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[:2] == first
    assert all(line["grad_norm"] < 1e3 and 0 <= line["rewards/feedback/mean"] <= 1 for line in lines), lines
    assert (run / "final/model.safetensors").exists()


def test_grpo_with_a_reward_server_on_the_gpu(home, tmp_path):
    served = {"backend": "classify", "serve": {"model": str(home / "judge"), "port": 8913}}
    base = ["grpo", "--recipe", "tiny", "--run-dir", str(tmp_path / "run"), *recipe(home, **served)]
    r1v(*base, *sets(launch={"preset": "ddp", "processes": 1}, model__dtype="bfloat16"), cache=home / "cache")
    assert len(steps_of(tmp_path / "run")) == 4


def test_sft_then_merge_of_an_adapter(home, tmp_path):
    base = ["sft", "--recipe", "tiny", "--run-dir", str(tmp_path / "run")]
    base += sets(
        model__name=str(home / "model"), model__min_pixels=784, model__max_pixels=56 * 56, data__path=str(home / "data"),
        data__max_prompt_tokens=200, data__split="train", train__max_steps=3, train__per_device_train_batch_size=4, model__dtype="bfloat16",
        model__lora={"r": 4}, launch={"preset": "ddp", "processes": 1},
    )  # fmt: skip
    r1v(*base, cache=home / "cache")
    r1v("merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), cache=home / "cache")
    assert (tmp_path / "merged/config.json").exists()


@pytest.mark.skipif(not REAL, reason="R1V_GPU_REAL names no folder for weights of the published shapes")
@pytest.mark.parametrize("name, changes", [
    ("qwen25vl-3b-lora-24gb", {}),
    ("qwen25vl-3b-rlhfv", {"launch": {"preset": "zero2", "processes": 1}}),
])  # fmt: skip
def test_a_shipped_recipe_at_published_shapes(tmp_path, name, changes):
    """Two steps of the recipe, with a judge of the same shapes in its process; what it measured is printed."""
    from tests.gpu.grpo_step import write_model

    model = Path(str(REAL))
    if not (model / "config.json").exists():
        write_model(model, "3b")
    write_rows(tmp_path, draw_rows(12, sizes=((616, 616), (448, 616), (616, 448))))
    judge = {"name": "feedback", "cache": False, "canaries": None, "backend": "local", "model": str(model)}
    done = r1v(
        "grpo", "--recipe", name, "--run-dir", str(tmp_path / "run"), "--json",
        *sets(model__name=str(model), data__path=str(tmp_path), rewards=[{"name": "format"}, judge],
              train__max_steps=2, train__save_strategy="no", **changes),
        cache=tmp_path / "cache",
    )  # fmt: skip
    lines = steps_of(tmp_path / "run")
    assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)
    kept = ("step_time", "grad_norm", "completions/mean_length", "memory", "peak_memory_gb", "judge/latency_p95")
    print(name, [{k: v for k, v in line.items() if k.startswith(kept)} for line in lines])
    print({k: v for k, v in json.loads(done.stdout).items() if k in ("seconds", "versions")})
