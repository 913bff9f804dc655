"""What a run shows: what would be started, how it goes on, the table at its end; the files of its workers tell."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from ..config import recipes
from ..config.schema import STAGES
from ..core import console
from ..core.errors import UsageError
from ..run.run_dir import SAID, RunDir
from . import processes as launch


class _View:
    """What follows a file: a progress bar on a terminal, a line every 10 s elsewhere, from the first step on."""

    def __init__(self) -> None:
        self._bar = ExitStack()
        self._progress: console.Progress | None = None
        self._step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()

    def update(self) -> None:
        """Show what is new since the last call."""
        raise NotImplementedError

    def _advance(self, title: str, step: int, total: int | None, note: str) -> None:
        if self._progress is None:
            self._progress = self._bar.enter_context(console.progress(title, total))
        self._progress.advance(max(0, step - self._step), note)
        self._step = max(step, self._step)


class RunView(_View):
    """Follows a run: its steps, samples, and what rank 0 says."""

    _SHOWN = (
        ("reward", "reward", "{:.3f}"),
        ("rewards/format/mean", "format", "{:.2f}"),
        ("completions/mean_length", "length", "{:.1f}"),
        ("loss", "loss", "{:.4g}"),
    )

    def __init__(self, stage: str, where: RunDir):
        super().__init__()
        self._stage, self._where = stage, where
        self._offsets = {where.metrics: where.metrics.stat().st_size if where.metrics.is_file() else 0}

    def update(self) -> None:
        logs = self._where.logs
        for said in self._new(logs / SAID):
            (console.warn if said["warning"] else console.log)(said["text"])
        for sample in self._new(logs / "samples.jsonl"):
            console.log("\n".join(f"  {key}: {value}" for key, value in sample.items()))
        for line in self._new(self._where.metrics):
            note = " ".join(
                f"{n} {f.format(line[k])}" for k, n, f in self._SHOWN if isinstance(line.get(k), int | float)
            )
            self._advance(self._stage, int(line.get("step", 0)), self._where.status.get("max_steps"), note)

    def _new(self, path: Path) -> list[dict]:
        """The whole lines of a JSONL file since the last call."""
        if not path.is_file():
            return []
        offset = self._offsets.get(path, 0)
        if path.stat().st_size < offset:  # a resumed run cut back what followed its checkpoint
            offset = 0
        with open(path, "rb") as f:
            f.seek(offset)
            data = f.read()
        end = data.rfind(b"\n") + 1
        self._offsets[path] = offset + end
        return [json.loads(line) for line in data[:end].splitlines() if line.strip()]


class LogView(_View):
    """Follows the progress that a module without a run dir writes into its log: `judge: 30/250 loss 0.5`."""

    def __init__(self, log: Path):
        super().__init__()
        self._log = log

    def update(self) -> None:
        found = re.findall(r"^(.+): (\d+)/(\d+) ?(.*)$", "\n".join(launch.tail(self._log)), re.MULTILINE)
        if not found or int(found[-1][1]) <= self._step:
            return
        title, step, total, note = found[-1]
        self._advance(title, int(step), int(total), note)


def show_dry_run(plan: dict[str, Any]) -> None:
    """Print what `jobs.train(dry_run=True)` found: recipe and commands on stdout, findings on stderr.

    Raises:
        UsageError: a check failed.
    """
    console.emit(recipes.dump(plan["recipe"]))
    if plan["server"]:
        console.emit(_shell(plan["server"]) + "\n")
    console.emit(_shell(plan))
    for kind in ("errors", "warnings", "unchecked"):
        for line in plan[kind]:
            console.log(f"{kind.rstrip('s') if kind != 'unchecked' else 'not checked'}: {line}")
    if plan["errors"]:
        raise UsageError(f"{len(plan['errors'])} of the checks failed; nothing was started")


def _shell(command: dict[str, Any]) -> str:
    return " ".join([f"{k}={v}" for k, v in sorted(command["env"].items())] + [command["command"]])


def summary_rows(summary: dict) -> list[list[str]]:
    """Rows (what, before, after) of the table that a finished run prints."""

    def number(value: Any, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = []
    for kind, pair in (summary.get("heldout_accuracy") or {}).items():
        rows.append([f"held-out accuracy, {kind}", number(pair.get("before")), number(pair.get("after"))])
    # GRPO's loss is near 0 whatever is learnt.
    figures = (("reward", "reward"), ("format_rate", "format rate")) if "reward" in summary else (("loss", "loss"),)
    for key, title in figures:
        pair = summary.get(key)
        if isinstance(pair, dict):
            rows.append([title, number(pair.get("first")), number(pair.get("last"))])
    for reason, count in (summary.get("dropped") or {}).items():
        rows.append([f"rows dropped, {reason}", "", str(count)])
    for key, count in (summary.get("judge") or {}).items():
        if count and key != "floored":  # answers that no judge was asked about
            rows.append(
                [f"judge {key.replace('failed/', 'calls failed, ').replace('_', ' ')}", "", f"{round(count, 4):,}"]
            )
    part = False
    for title, value in (summary.get("seconds") or {}).items():
        rows.append([f"  of it, {title}" if part else f"time, {title}", "", f"{value:.0f} s"])
        part = part or title in STAGES  # what the worker measured follows its stage
    return rows
