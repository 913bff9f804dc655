"""What a GRPO run leaves in its run dir beside its metrics: every rollout as parquet, and the summary.

No torch here: rank 0 writes what the trainer gathered.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.files import read_json, read_jsonl, write_bytes, write_json
from ..core.prompts import parse
from ..run.run_dir import RunDir


@dataclass
class Rollout:
    """One completion of one prompt, as it was scored.

    `group`: number of the prompt within the step. `tokens`: length of the completion. `clipped`: cut at the limit,
    no end token. `rewards`: raw score by name, None where not scored. `reward`: weighted sum, None when the sample is
    out of its group (a required reward is missing). `advantage`: None when the step was stopped before it had one.
    """

    step: int
    group: int
    id: str
    prompt: str
    completion: str
    tokens: int
    clipped: bool
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None


def rollout_file(run_dir: RunDir, step: int) -> Path:
    """Where the rollouts that trained step `step` (from 1) are."""
    return run_dir.rollouts / f"step-{step:08d}.parquet"


def write_rollouts(run_dir: RunDir, step: int, rollouts: Sequence[Rollout]) -> None:
    """Write all rollouts of one step (whole file or nothing); null means not scored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(rollouts[0].rewards) if rollouts else []
    columns: dict[str, Any] = {
        "step": pa.array([r.step for r in rollouts], pa.int64()),
        "group": pa.array([r.group for r in rollouts], pa.int64()),
        "id": pa.array([r.id for r in rollouts], pa.string()),
        "prompt": pa.array([r.prompt for r in rollouts], pa.string()),
        "completion": pa.array([r.completion for r in rollouts], pa.string()),
        "answer": pa.array([parse(r.completion).answer for r in rollouts], pa.string()),
        "tokens": pa.array([r.tokens for r in rollouts], pa.int64()),
        "clipped": pa.array([r.clipped for r in rollouts], pa.bool_()),
    }
    for name in names:
        columns[f"rewards/{name}"] = pa.array([r.rewards[name] for r in rollouts], pa.float64())
    columns["reward"] = pa.array([r.reward for r in rollouts], pa.float64())
    columns["advantage"] = pa.array([r.advantage for r in rollouts], pa.float64())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    write_bytes(rollout_file(run_dir, step), buffer.getvalue())


def truncate_rollouts(run_dir: RunDir, step: int) -> None:
    """Delete the rollouts of steps after `step`: a resumed run makes them again."""
    for file in run_dir.rollouts.glob("step-*.parquet"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()


def update_summary(run_dir: RunDir, fields: dict) -> dict:
    """Merge `fields` into summary.json, dicts in dicts too, and return the whole."""
    summary = _merged(read_json(run_dir.summary) if run_dir.summary.is_file() else {}, fields)
    write_json(run_dir.summary, summary)
    return summary


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def summarise_metrics(run_dir: RunDir) -> dict:
    """Figures of metrics.jsonl for the summary.

    `reward` and the means of each reward as {first, last}: the mean over the first and the last tenth of the logged
    steps (at least one), since one step's mean is noise. `judge`: totals of what the judge counted.
    """
    lines = [d for _, d in read_jsonl(run_dir.metrics)] if run_dir.metrics.is_file() else []
    if not lines:
        return {"steps": 0}
    window = max(1, len(lines) // 10)

    def ends(key: str) -> dict[str, float | None]:
        return {
            "first": _mean([d.get(key) for d in lines[:window]]),
            "last": _mean([d.get(key) for d in lines[-window:]]),
        }

    names = sorted({k for d in lines for k in d if k.startswith("rewards/") and k.endswith("/mean")})
    totals: dict[str, float] = {}
    for d in lines:
        for key, value in d.items():
            if key.startswith("judge/") and "latency" not in key and value is not None:
                totals[key.removeprefix("judge/")] = totals.get(key.removeprefix("judge/"), 0) + value
    summary = {
        "steps": lines[-1]["step"],
        "reward": ends("reward") | {"steps_averaged": window},
        "format_rate": ends("rewards/format/mean"),
        "loss": ends("loss"),
        "rewards": {name.split("/")[1]: ends(name) for name in names},
        "completion_length": ends("completions/mean_length"),
        "step_time_mean": _mean([d.get("step_time") for d in lines]),
    }
    return summary | ({"judge": totals} if totals else {})


def _mean(values: list[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return sum(numbers) / len(numbers) if numbers else None
