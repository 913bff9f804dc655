"""What a run shows while it goes on, and the table at its end: read from the files that its workers write."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import console, launch
from .config import STAGES
from .run_dir import SAID, RunDir


class RunView:
    """Follows a run: a progress bar on a terminal, a line every 10 s elsewhere, samples, and what rank 0 says."""

    _SHOWN = (
        ("reward", "reward", "{:.3f}"),
        ("rewards/format/mean", "format", "{:.2f}"),
        ("completions/mean_length", "length", "{:.1f}"),
        ("loss", "loss", "{:.4g}"),
    )

    def __init__(self, stage: str, where: RunDir):
        self._stage, self._where = stage, where
        self._offsets = {where.metrics: where.metrics.stat().st_size if where.metrics.is_file() else 0}
        self._bar = ExitStack()
        self._progress: console.Progress | None = None
        self._step = 0

    def __enter__(self) -> RunView:
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()

    def update(self) -> None:
        """Show what was logged since the last call."""
        logs = self._where.logs
        for said in self._new(logs / SAID):
            (console.warn if said["warning"] else console.log)(said["text"])
        for sample in self._new(logs / "samples.jsonl"):
            console.log("\n".join(f"  {key}: {value}" for key, value in sample.items()))
        for line in self._new(self._where.metrics):
            step = int(line.get("step", 0))
            if self._progress is None:
                bar = console.progress(self._stage, self._where.status.get("max_steps"))
                self._progress = self._bar.enter_context(bar)
            note = " ".join(
                f"{n} {f.format(line[k])}" for k, n, f in self._SHOWN if isinstance(line.get(k), int | float)
            )
            self._progress.advance(max(0, step - self._step), note)
            self._step = max(step, self._step)

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


class LogView:
    """Follows the progress that a module without a run dir writes into its log: `judge: 30/250 loss 0.5`."""

    def __init__(self, log: Path):
        self._log = log
        self._bar = ExitStack()
        self._progress: console.Progress | None = None
        self._step = 0

    def __enter__(self) -> LogView:
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()

    def update(self) -> None:
        """Show the newest line, if it is new."""
        found = re.findall(r"^(.+): (\d+)/(\d+) ?(.*)$", "\n".join(launch.tail(self._log)), re.MULTILINE)
        if not found or int(found[-1][1]) <= self._step:
            return
        title, step, total, note = found[-1]
        if self._progress is None:
            self._progress = self._bar.enter_context(console.progress(title, int(total)))
        self._progress.advance(int(step) - self._step, note)
        self._step = int(step)


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
