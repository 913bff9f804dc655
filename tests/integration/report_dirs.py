"""Run dirs and eval dirs as r1v writes them, with invented numbers, for the report's tests."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw

from r1vfree_cli.eval.runner import EvalOptions, evaluate


def drawing(seed: int, size: tuple[int, int] = (168, 112)) -> bytes:
    """A PNG with two coloured shapes."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(2):
        x, y = rng.randrange(size[0] - 50), rng.randrange(size[1] - 50)
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape((x, y, x + 45, y + 45), fill=rng.choice(("crimson", "royalblue", "seagreen", "orange")))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(
    path: Path,
    *,
    steps: int = 120,
    state: str = "finished",
    seed: int = 0,
    completion: str | None = None,
    plain: bool = False,
) -> Path:
    """A GRPO run with metrics (`plain`: reward alone), rollouts every 20 steps over 8 rows with images, summary and contract."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    data = path.parent / f"{path.name}-data"
    data.mkdir()
    rows = [
        {"id": f"row-{i}", "images": [{"bytes": drawing(i), "path": None}], "problem": f"What colour is shape {i}?"}
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), data / "train-00000.parquet")
    recipe = {
        "model": {"name": "Qwen/Qwen2.5-VL-3B-Instruct"},
        "data": {"path": str(data), "split": "train"},
        "rewards": [{"name": "format", "weight": 1.0}, {"name": "feedback", "weight": 1.0, "backend": "classify"}],
        "train": {"num_generations": 8},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path / "status.json").write_text(json.dumps({"state": state, "step": steps, "attempt": 1, "reason": None}))
    command = "r1v grpo --recipe tiny --set train.max_steps=120"
    (path / "launch.json").write_text(
        json.dumps(
            {
                "command": command,
                "argv": ["python", "-m", "accelerate.commands.launch", "--num_processes", "1"],
                "env": {"SOME_KEY": "env-value"},
            }
        )
    )
    metrics = []
    for step in range(1, steps + 1):
        t = step / steps
        form, feedback = min(1, 0.3 + t + rng.gauss(0, 0.05)), 0.35 + 0.3 * t + rng.gauss(0, 0.04)
        line = {
            "step": step,
            "reward": form + feedback,
            "reward_std": 0.35 - 0.2 * t + rng.gauss(0, 0.02),
            "rewards/format/mean": form,
            "rewards/feedback/mean": feedback,
            "completions/mean_length": 60 + 90 * math.sin(2 * t) + rng.gauss(0, 5),
            "kl": 0.02 * t + abs(rng.gauss(0, 0.002)),
            "loss": 0.001 * t,
            "step_time": 4.2 + rng.random(),
            "judge/calls": 64,
            "judge/failed/timeout": int(step % 40 == 0),
        }
        # Pictures are what a report takes longest for: a plain run has one curve.
        metrics.append({k: line[k] for k in ("step", "reward")} if plain else line)
    write_jsonl(path / "metrics.jsonl", metrics)
    (path / "rollouts").mkdir()
    for step in range(1, steps + 1, 20):
        rollouts = []
        for group in range(4):
            for g in range(8):
                good = rng.random() < 0.3 + 0.5 * step / steps
                text = f"<think>The shape has one fill.\nIt looks {'uniform' if good else 'mixed'}.</think><answer>{'red' if good else 'blue'}</answer>"
                answer = "red" if good else "blue"
                if g == 5:
                    text, answer = "I cannot tell " * 30, None
                if g == 0 and completion:
                    text = answer = completion
                rollouts.append(
                    {
                        "step": step,
                        "group": group,
                        "id": f"row-{(step + group) % 8}",
                        "prompt": f"What colour is shape {(step + group) % 8}?",
                        "completion": text,
                        "answer": answer,
                        "rewards/format": 0.0 if answer is None else 1.0,
                        "rewards/feedback": None if g == 3 else float(good),
                        "advantage": 0.0 if g == 3 else (0.9 if good else -0.7),
                    }
                )
        pq.write_table(pa.Table.from_pylist(rollouts), path / "rollouts" / f"step-{step:08d}.parquet")
    summary = {
        "seconds": {"load": 41.5, "held-out before": 95.1, "train": 3100.0, "save": 12.0},
        "heldout_accuracy": {"greedy": {"before": 0.412, "after": 0.538}, "sampled": {"before": 0.371, "after": 0.502}},
        "heldout_format": {"greedy": {"before": 0.33, "after": 0.98}},
    }
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "final").mkdir()
    contract = {
        "schema": 1,
        "template_hash": "a" * 64,
        "min_pixels": 3136,
        "max_pixels": 401408,
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "sampling": {"temperature": 1.0},
        "rewards": [{"name": "format"}, {"name": "feedback", "model": "judge"}],
        "data": {"path": str(data), "sha256": "b" * 64},
        "versions": {"r1v": "1.0.0", "torch": "2.15.0"},
    }
    (path / "final" / "r1v.json").write_text(json.dumps(contract))
    return path


def questions() -> list[dict]:
    """Two sets in each of four subcategories, each with two figures and two questions."""
    found = []
    for category, subcategory in (("VD", "figure"), ("VD", "illusion"), ("VS", "chart"), ("VS", "map")):
        for set_id in range(2):
            for figure in range(2):
                for q in range(2):
                    text_only = category == "VS" and figure == 0
                    found.append(
                        {
                            "category": category,
                            "subcategory": subcategory,
                            "visual_input": "0" if text_only else str(figure + 1),
                            "set_id": str(set_id),
                            "figure_id": str(figure),
                            "question_id": str(q),
                            "question": f"Is the {subcategory} of set {set_id} like the other? ({q})",
                            "gt_answer": str((figure + q) % 2),
                            "gt_answer_details": "details",
                            "filename": None if text_only else f"./{category}/{subcategory}/{set_id}_{figure}.png",
                        }
                    )
    return found


def make_eval(
    path: Path,
    *,
    right: float = 0.6,
    seed: int = 0,
    asked: list[dict] | None = None,
    protocol: str = "official",
    reply: str | None = None,
) -> Path:
    """What `r1v eval-hallusion --predictions` makes of random replies, `right` of them right; figures lie beside it."""
    rng = random.Random(seed)
    images, made = path.parent / "figures", path.parent / f"{path.name}-made"
    made.mkdir(parents=True)
    asked = asked or questions()
    predictions = []
    for i, q in enumerate(asked):
        said = "yes" if (q["gt_answer"] == "1") == (rng.random() < right) else "no"
        text = reply or f"<think>I look at the figure.</think><answer>{said}</answer>"
        predictions.append({**q, "model_prediction": text})
        if q["filename"]:
            file = images / q["filename"]
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_bytes(drawing(i))
    (made / "predictions.json").write_text(json.dumps(predictions))
    (made / "questions.json").write_text(json.dumps(asked))
    options = {"predictions": made / "predictions.json", "questions": str(made / "questions.json"), "images": images}
    evaluate(EvalOptions(**options, out=path, protocol=protocol, judge="rule"))  # type: ignore[arg-type]
    state = json.loads((path / "eval.json").read_text())
    given = [f"--{key}={value}" for key, value in options.items()]
    command = ["/usr/bin/r1v", "eval-hallusion", *given, "--judge", "rule"]
    state["commands"] = {"judge": command, "score": command}
    (path / "eval.json").write_text(json.dumps(state))
    return path
