"""What a run shows: what would be started, how it goes on, the table at its end; the files of its workers tell."""

import json
import re
import shlex
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from ..config import recipes
from ..config.schema import STAGES
from ..core import console
from ..core.errors import UsageError, counted
from ..run.run_dir import SAID, RunDir
from . import processes as launch


class _View(ExitStack):
    """What follows a file: a progress bar on a terminal, a line every 10 s elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: console.Progress | None = None
        self._step = 0

    def _advance(self, title: str, step: int, total: int | None, note: str) -> None:
        self._progress = self._progress or self.enter_context(console.progress(title))
        self._progress.advance(max(0, step - self._step), note, total)
        self._step = max(step, self._step)


_SHOWN = {  # GRPO's loss is near 0 whatever is learnt
    "grpo": {
        "reward": "reward {:.3f}",
        "reward_std": "spread {:.2f}",
        "rewards/format/mean": "format {:.2f}",
        "completions/mean_length": "length {:.0f}",
        "kl": "kl {:.2g}",
        "judge/latency_p95": "judge {:.2g} s",
    },
    "sft": {"loss": "loss {:.4g}", "mean_token_accuracy": "token accuracy {:.2f}"},
}


class RunView(_View):
    """Follows a run: its steps, samples, and what rank 0 says."""

    def __init__(self, stage: str, where: RunDir):
        super().__init__()
        self._stage, self._where = stage, where
        self._offsets = {where.metrics: where.metrics.stat().st_size if where.metrics.is_file() else 0}

    def __enter__(self) -> Self:
        self._progress = self.enter_context(console.progress(self._stage))  # its clock runs while models load
        return self

    def update(self) -> None:
        logs = self._where.logs
        for said in self._new(logs / SAID):
            (console.warn if said["warning"] else console.log)(said["text"])
        for sample in self._new(logs / "samples.jsonl"):
            console.log("\n".join(f"  {key}: {value}" for key, value in sample.items()))
        for line in self._new(self._where.metrics):
            # An evaluation, which rank 0 has told; or a line that somebody edits, as below.
            if "loss" not in line or type(line.get("step")) is not int or line["step"] > 10**12:
                continue
            note = " ".join(
                told.format(line[key])
                for key, told in _SHOWN[self._stage].items()
                if isinstance(line.get(key), int | float) and abs(line[key]) < 1e300
            )
            self._advance(self._stage, line["step"], self._where.status.get("max_steps"), note)

    def _new(self, path: Path) -> list[dict]:
        """The complete lines of a JSONL file since the last call."""
        if not path.is_file():
            return []
        with open(path, "rb") as f:
            # A resumed run cuts back what followed its checkpoint.
            offset = self._offsets.get(path, 0) if self._offsets.get(path, 0) <= path.stat().st_size else 0
            f.seek(offset)
            data = f.read()
        end = data.rfind(b"\n") + 1
        self._offsets[path] = offset + end
        found = []
        for line in data[:end].splitlines():
            with suppress(ValueError, RecursionError):  # somebody edits the file: no reason to end the run
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]


class LogView(_View):
    """Follows the progress that a module without a run dir writes into its log: `judge: 30/250 0:12<1:28 loss 0.5`."""

    def __init__(self, log: Path):
        super().__init__()
        self._log = log

    def update(self) -> None:
        form = r"^(.+): (\d+)/(\d+)(?: [\d:]+(?:<[\d:]+)?)? ?(.*)$"
        for title, step, total, note in re.findall(form, "\n".join(launch.tail(self._log)), re.MULTILINE)[-1:]:
            if int(step) > self._step:
                self._advance(title, int(step), int(total), note)


def show_dry_run(name: str, plan: dict[str, Any], json: bool) -> None:
    """Print what `jobs.train(dry_run=True)` found: recipe and commands on stdout, findings on stderr; or as one JSON.

    Raises UsageError: a check failed. With `json` stdout is then empty, as with every error.
    """
    failed = plan["errors"]
    if json and not failed:
        console.emit_json(plan)
    elif not json:
        console.emit(recipes.dump(plan["recipe"]))
        if plan["server"]:
            console.emit(_shell(plan["server"]) + "\n")
        console.emit(_shell(plan))
        lines = [f"warning: {line}" for line in plan["warnings"]]
        for line in [*lines, *(f"not checked: {line}" for line in plan["unchecked"])]:
            console.log(line)
    if failed:
        raise UsageError(f"recipe {name}: {counted(len(failed), 'check')} failed; nothing was started", details=failed)


def last_lines(stage: str, where: str, adapter: bool, best: dict | None = None) -> str:
    """Where the model of a finished run lies, and what to run next."""
    run, final = shlex.quote(where), shlex.quote(f"{where}/final")
    then = f"r1v eval hallusion {run}"
    if stage == "sft":
        then = f"r1v grpo --recipe NAME --set model.name={final}"
    elif adapter:
        merged = shlex.quote(f"{where}/merged")
        then = f"r1v merge {run} --out {merged}, then r1v eval hallusion {merged}"
    look = f"r1v view {run}; r1v report {run}" if stage == "grpo" else f"r1v report {run}"
    kept = ""
    if best:
        metric, value = next((k, v) for k, v in best.items() if k != "step")
        kept = f"\n  best   {where}/checkpoints/checkpoint-{best['step']} ({metric} {value:.3g})"
    return f"  model  {where}/final{' (a LoRA adapter)' * adapter}{kept}\n  look   {look}\n  next   {then}"


def _shell(command: dict[str, Any]) -> str:
    return " ".join([f"{k}={v}" for k, v in sorted(command["env"].items())] + [command["command"]])


def summary_rows(summary: dict) -> list[list[str]]:
    """Rows (what, before, after) of the table that a finished run prints."""
    evaluation = summary.get("evaluation") or {}
    # GRPO's loss is near 0 whatever is learnt.
    figures = (("reward", "reward"), ("format_rate", "format rate")) if "reward" in summary else (("loss", "loss"),)
    accuracy = (summary.get("heldout_accuracy") or {}).items()
    pairs = [(f"held-out accuracy, {kind}", pair.get("before"), pair.get("after")) for kind, pair in accuracy]
    for metric, pair in (evaluation.get("metrics") or {}).items():
        pairs.append((f"{evaluation['benchmark']}, {metric}", pair.get("first"), pair.get("last")))
    for key, title in figures:
        pair = summary.get(key)
        pairs += [(title, pair.get("first"), pair.get("last"))] if isinstance(pair, dict) else []
    rows = [[title, *("" if value is None else f"{value:.3f}" for value in pair)] for title, *pair in pairs]
    for reason, count in (summary.get("dropped") or {}).items():
        rows.append([f"rows dropped, {reason}", "", str(count)])
    for key, count in (summary.get("judge") or {}).items():
        if count and key != "floored":  # answers that no judge was asked about
            said = key.replace("failed/", "calls failed, ").replace("_", " ")
            rows.append([f"judge {said}", "", f"{round(count, 4):,}"])
    part = False
    for title, value in (summary.get("seconds") or {}).items():
        rows.append([f"  of it, {title}" if part else f"time, {title}", "", f"{value:.0f} s"])
        part = part or title in STAGES  # what the worker measured follows its stage
    return rows
