"""Read run dirs and eval dirs as they are: killed, partial or damaged ones too. What is not there is noted, never made up."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.recipes import read_yaml
from ..core.errors import DataError, UsageError, counted, first_line
from ..core.files import read_object
from ..core.machine import library
from ..core.redact import BEARER, SECRET_KEY, SECRET_TEXT, URL_LOGIN
from ..run.run_dir import RunDir

REDACTED = "[redacted]"
UNFINISHED = "the run is not finished"  # how its note begins
_HIDDEN = ("env", "environ", "environment")  # values under these keys are never shown
_SECRET_NAME = re.compile(r"(?i)(key|token|secret|password|passwd|credential)s?$")  # of environment variables
_SECRET_FLAG = re.compile(
    r"(?i)((?:api[-_]?key|password|passwd|secret|authorization|(?:access|auth|hf|hub)[-_]?token)['\"]?\s*[=:]\s*['\"]?)[^\s'\",}]+"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Run:
    """A run dir, as far as it can be read. `notes` says what is missing from it."""

    path: Path
    label: str
    stage: str = "unknown"
    recipe: dict = field(default_factory=dict)
    status: dict = field(default_factory=dict)
    launch: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    contract: dict = field(default_factory=dict)
    rollouts: dict[int, Path] = field(default_factory=dict)  # step -> file
    notes: list[str] = field(default_factory=list)


@dataclass
class Eval:
    """An eval dir: `scores.json` (what `eval-hallusion --json` prints) and `eval.json` (how it was made). items,
    records, figures, by question id: the judged question, its record in judged.json, what reads its figure."""

    path: Path
    label: str
    scores: dict
    settings: dict
    notes: list[str]
    items: dict[str, Any] = field(default_factory=dict)
    records: dict[str, dict] = field(default_factory=dict)
    figures: dict[str, Callable[[], bytes]] = field(default_factory=dict)


def number(value: Any) -> float | None:
    """A number that a float holds, else None; true and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def clean(value: Any, secrets: list[str] | None = None) -> Any:
    """The same document, fit to be shown: secrets replaced, control characters and lone surrogates too."""
    secrets = _planted() if secrets is None else secrets
    if isinstance(value, dict):
        named = {str(k): v for k, v in value.items()}
        return {clean(k, secrets): REDACTED if v and _secret_key(k) else clean(v, secrets) for k, v in named.items()}
    if isinstance(value, list | tuple):
        # In an argv the value follows its flag: --api-key VALUE.
        flags = [isinstance(v, str) and v.startswith("--") and _secret_key(v[2:]) for v in value]
        return [REDACTED if i and flags[i - 1] else clean(v, secrets) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = _CONTROL.sub("\ufffd", str(value).replace("\r\n", "\n")).encode("utf-8", "replace").decode()
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = URL_LOGIN.sub(f"{REDACTED}@", text)
    text = BEARER.sub(REDACTED, SECRET_TEXT.sub(REDACTED, text))
    return _SECRET_FLAG.sub(rf"\1{REDACTED}", text)


def _secret_key(name: str) -> bool:
    return name.lower() in _HIDDEN or SECRET_KEY.match(name) is not None


def _planted() -> list[str]:
    """Values of this process's environment that are secrets by their variable's name."""
    return [v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= 8 and v[0] != "/"]


def collect(dirs: list[Path]) -> tuple[list[Run], list[Eval]]:
    """Read the given dirs, each once, in the order given.

    Raises UsageError: none given, or evals of different protocols. DataError: one is neither a run dir nor an eval dir,
    its main files are damaged, or evals of different numbers of questions.
    """
    if not dirs:
        raise UsageError("no folder given", hint="r1v report RUN_OR_EVAL_DIR...")
    unique = list({Path(d).resolve(): Path(d) for d in dirs}.values())
    runs, evals = [], []
    for path, label in zip(unique, labels(unique)):
        is_run, is_eval = RunDir(path).holds_run, (path / "scores.json").is_file()
        runs += [read_run(path, label)] if is_run else []
        evals += [read_eval(path, label)] if is_eval else []
        if not is_run and not is_eval:
            raise _neither(path)
    for key, what, error in (("protocol", "protocols", UsageError), ("n_questions", "numbers of questions", DataError)):
        found: dict[str, list[str]] = {}
        for e in evals:
            found.setdefault(str(e.scores.get(key)), []).append(str(e.path))
        if len(found) > 1:
            told = f"the evals have different {what}, and their scores cannot stand in one table"
            details = [f"{value}: {', '.join(who)}" for value, who in found.items()]
            raise error(told, details=details, hint="make one report for each")
    return runs, evals


def _neither(path: Path) -> DataError:
    if not path.is_dir():
        what = "is a file, not a run dir or eval dir" if path.exists() else "does not exist"
        return DataError(f"{path} {what}", hint="give run dirs and eval dirs")
    if (path / "eval.json").is_file():
        what = f"{path} is an eval dir without scores.json: it is not scored yet"
        return DataError(what, hint="run the same r1v eval again; it asks only for what is missing")
    with library(f"cannot read {path}"):
        names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
    found = ", ".join(names[:8] + [f"and {len(names) - 8} more"] * (len(names) > 8)) or "nothing"
    hint = "a run dir holds recipe.yaml and status.json, an eval dir scores.json and eval.json"
    details = [f"found in it: {clean(found)}"]
    return DataError(f"{path} is neither a run dir nor an eval dir", details=details, hint=hint)


def labels(paths: list[Path]) -> list[str]:
    """A short name for each path: its last part, with as many parents as make all names different."""
    parts = [p.resolve().parts for p in paths]
    names = []
    for own in parts:
        alone = (n for n in range(1, len(own)) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        n = next(alone, len(own))
        if own[-n:] in (("eval",), ("final",)) and len(own) > n + 1:
            n += 1
        names.append(clean("/".join(own[-n:])))
    return names


def read_run(path: Path, label: str) -> Run:
    """Read a run dir. Raises DataError: `status.json` is damaged."""
    files, notes = RunDir(path), list[str]()
    status = clean(files.status)
    recipe = _optional(files.recipe, notes, lambda p: read_yaml(p.read_text(encoding="utf-8"), "it"))
    run = Run(
        path,
        label,
        stage="grpo" if "rewards" in recipe else "sft" if recipe else "unknown",
        recipe=recipe,
        status=status,
        launch=_optional(files.launch, notes),
        summary=_optional(files.summary, notes),
        contract=_optional(files.final / "r1v.json", notes),
        metrics=read_metrics(files.metrics, notes),
        rollouts=files.rollout_files,
        notes=notes,
    )
    if run.stage == "grpo" and not run.rollouts:
        notes.append("no rollouts were kept (rollouts/ is empty or not there)")
    state, reason = status.get("state"), status.get("reason")
    if state != "finished":
        notes.append(f"{UNFINISHED}: {state or 'no status.json'}" + (f" ({reason})" if reason else ""))
    return run


def read_metrics(path: Path, notes: list[str]) -> list[dict]:
    """Lines of metrics.jsonl by step, numbers only; a step that is there twice (a resume) counts once, the last wins.
    Damaged lines and a cut last line (killed writer) are left out and noted."""
    if not path.is_file():
        notes.append(f"{path.name} is not there")
        return []
    lines: dict[float, dict] = {}
    damaged = 0
    for text in path.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            damaged += text.endswith(b"\n")
            if not text.endswith(b"\n"):
                notes.append(f"{path.name}: the last line is cut (its writer was killed) and left out")
            continue
        if isinstance(line, dict) and (step := number(line.get("step"))) is not None:
            numbers = {clean(k): number(v) for k, v in line.items()}
            lines[step] = lines.get(step, {}) | {k: v for k, v in numbers.items() if v is not None}
    if damaged:
        notes.append(f"{path.name}: {counted(damaged, 'damaged line')} left out")
    return [lines[step] for step in sorted(lines)]


def read_eval(path: Path, label: str) -> Eval:
    """Read an eval dir. Raises DataError: `scores.json` is damaged or no result of an evaluation."""
    scores = clean(read_object(path / "scores.json"))
    if not isinstance(scores.get("metrics"), dict) or not scores.get("protocol"):
        what = f"{path / 'scores.json'} is no result of r1v eval: `protocol` and `metrics` are needed"
        raise DataError(what, details=["found: " + ", ".join(list(scores)[:12])])
    notes: list[str] = []
    return Eval(path, label, scores, _optional(path / "eval.json", notes), notes)


def _optional(path: Path, notes: list[str], read: Callable[[Path], Any] = read_object) -> dict:
    where = f"{path.parent.name}/{path.name}" if path.parent.name == "final" else path.name
    try:
        if not path.is_file():
            notes.append(f"{where} is not there")
        elif isinstance(document := read(path), dict):
            return clean(document)
        else:
            notes.append(f"{where} is damaged: it holds no recipe")
    except (DataError, UsageError, OSError, ValueError) as e:
        notes.append(f"{where} is damaged: {clean(first_line(e))}")
    return {}
