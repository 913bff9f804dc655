"""The rollouts of a step as gallery and viewer show them: groups of one question, and what marks each sample."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import DataError, first_line
from ..core.prompts import INSTRUCTION, parse
from .load import clean, number


def read_groups(file: Path, step: int, recipe: dict) -> list[dict]:
    """The groups of a step: question, samples, spread of advantages, disagreement of the recipe's judges.
    Raises DataError: the file is damaged."""
    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"rollouts/{file.name} cannot be read: {clean(first_line(e))}") from None
    groups: dict[tuple[int, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row.get("group") or 0, str(row.get("id"))), []).append(row)
    rewards = [r for r in recipe.get("rewards") or [] if isinstance(r, dict)]
    judges = {clean(str(r.get("label") or r["name"])) for r in rewards if r.get("name") == "feedback"}
    return [_group(step, *key, members, judges) for key, members in groups.items()]


def _group(step: int, group: int, row_id: str, members: list[dict], judges: set[str]) -> dict:
    texts = [str(m.get("completion")) for m in members]
    answers = [parse(text).answer for text in texts]
    samples = [
        {
            "completion": clean(text),
            "answer": clean(answer),
            "format": parse(text).problem,
            "rewards": {k: number(v) for k, v in _under("rewards/", m).items()},
            "verdicts": _under("verdicts/", m),
            **{name: number(m.get(name)) for name in ("reward", "advantage", "tokens")},
            "clipped": bool(m.get("clipped")),
            "duplicate": texts.count(text) > 1,
            # Most of a group gives one answer: it may be a template that pleases the judge.
            "template": len(members) > 3 and answers.count(answer) > 0.75 * len(members),
        }
        for m, text, answer in zip(members, texts, answers)
    ]
    opinions = [[v for k, v in s["rewards"].items() if k in judges] for s in samples]
    return {
        "step": step,
        "group": group,
        "id": clean(row_id),
        "question": question(members[0].get("prompt")),
        "samples": samples,
        "spread": _range([s["advantage"] for s in samples]),
        "disagreement": max(map(_range, opinions)),
    }


def _under(prefix: str, row: dict) -> dict[str, Any]:
    return {clean(k.removeprefix(prefix)): v for k, v in row.items() if k.startswith(prefix)}


def _range(values: list[float | None]) -> float:
    known = [v for v in values if v is not None]
    return max(known) - min(known) if known else 0.0


def question(prompt: Any) -> str:
    """The question of a prompt: without the instruction, chat markup and image tokens."""
    text = str(prompt or "").replace(INSTRUCTION, "")
    if "<|im_start|>user" in text:
        text = text.split("<|im_start|>user")[-1].split("<|im_end|>")[0]
    return clean(re.sub(r"<\|(?:vision_start|vision_end|image_pad|video_pad)\|>", "", text).strip())
