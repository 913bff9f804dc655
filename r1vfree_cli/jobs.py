"""`r1v sft` and `r1v grpo`, from a recipe's name to a finished run dir: what the CLI calls for both."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import console, contract, embedded, launch, preflight, ranks, recipes, run_dir
from .config import STAGES, GrpoRecipe, SftRecipe
from .errors import GuardStop, Interrupted, R1VError, UsageError
from .run_dir import RunDir


def train(
    stage: str,
    name: str,
    overrides: list[str],
    *,
    path: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict:
    """Run a recipe to its end and return its summary; with `dry_run`, what would be run.

    Raises:
        UsageError: recipe, machine or run dir.
        DataError: data or checkpoint.
        GuardStop: training stopped itself.
        Interrupted: SIGINT or SIGTERM.
    """
    recipe = recipes.load(stage, name, overrides)
    findings = preflight.check(recipe, dry_run=dry_run)
    where = RunDir(path or Path("runs") / Path(name).stem)
    plan = launch.plan(stage, recipe, where.path)
    if dry_run:
        return _dry_run(recipe, findings, plan)
    findings.raise_errors(f"recipe {name}")
    for line in findings.warnings:
        console.warn(line)
    resume = resume or _unfinished(where, recipe, overwrite)
    return run(stage, recipe, where, resume=resume, overwrite=overwrite)


def _dry_run(recipe: GrpoRecipe | SftRecipe, findings: preflight.Findings, plan: launch.Plan) -> dict:
    server = launch.server_plan(recipe, recipe.served.port or 8000) if recipe.served else None
    return {
        "recipe": recipe.model_dump(mode="json"),
        "command": shlex.join(plan.argv),
        "env": plan.env,
        "processes_here": plan.processes,
        "server": {"command": shlex.join(server.argv), "env": server.env} if server else None,
        "errors": findings.errors,
        "warnings": findings.warnings,
        "unchecked": findings.unchecked,
    }


def _unfinished(where: RunDir, recipe: GrpoRecipe | SftRecipe, overwrite: bool) -> bool:
    """True when the folder holds a run of this very recipe that did not finish; says so."""
    if overwrite or not where.holds_run or not where.recipe.is_file() or recipe.launch.node_rank:
        return False
    state = where.status.get("state")
    same = where.recipe.read_bytes() == recipes.to_yaml(recipe).encode("utf-8")
    if not same or state == run_dir.FINISHED:
        return False
    console.log(f"{where.path} holds an unfinished run of this recipe ({state or 'not started'}): resuming it")
    return True


def run(
    stage: str, recipe: GrpoRecipe | SftRecipe, where: RunDir, *, resume: bool = False, overwrite: bool = False
) -> dict:
    """Run a resolved recipe in a run dir: models and data it needs, then the workers. Returns the summary."""
    node = recipe.launch.node_rank
    seconds: dict[str, float] = {}
    with _sigterm_as_ctrl_c(), _locked(where.path, node) if node == 0 else nullcontext():
        if node == 0:
            if where.holds_run:
                ranks.end_orphans(where.logs)
            where.begin(recipes.to_yaml(recipe), resume=resume, overwrite=overwrite)
            logs, recipe_file = where.logs, where.recipe
        else:
            # Node 0 owns the run dir; the others keep their recipe and logs apart.
            logs = where.path / "nodes" / str(node)
            ranks.end_orphans(logs)
            recipe_file = logs / "recipe.yaml"
            run_dir.write_text(recipe_file, recipes.to_yaml(recipe))
        try:
            prepare(recipe, seconds)
            _launch(stage, recipe, where, logs, recipe_file, resume, seconds)
        except BaseException as e:
            if node == 0:
                _failed(where, e)
            raise
        if node:
            return {"run_dir": str(where.path), "node": node}
        summary = run_dir.read_json(where.summary)
        summary["seconds"] = {**seconds, **summary.get("seconds", {})}
        run_dir.write_json(where.summary, summary)
        return {"run_dir": str(where.path), **summary}


def _failed(where: RunDir, error: BaseException) -> None:
    state = run_dir.FAILED
    if isinstance(error, Interrupted | KeyboardInterrupt):
        state = run_dir.INTERRUPTED
    elif isinstance(error, GuardStop):
        state = run_dir.STOPPED
    try:
        where.set_status(state, reason=error.message if isinstance(error, R1VError) else repr(error))
    except OSError as e:  # a full disk, most likely: the error itself is what matters
        console.warn(f"cannot write {where.status_file}: {e}")


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Between launches too, a scheduler's SIGTERM ends a run as interrupted."""

    def stop(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def _locked(path: Path, node: int) -> Iterator[None]:
    """Two processes never write one run dir. The lock lies beside the folder, which may be deleted and made anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    with open(lock, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another r1v process is using {path}", hint="wait for it, or choose another --run-dir"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _timed(title: str, seconds: dict[str, float]) -> Iterator[None]:
    console.log(f"{title} ...")
    start = time.monotonic()
    yield
    seconds[title] = round(time.monotonic() - start, 1)
    console.log(f"{title}: {seconds[title]:.0f} s")


def prepare(recipe: GrpoRecipe | SftRecipe, seconds: dict[str, float] | None = None) -> None:
    """Make what the recipe needs and this machine lacks: embedded models, prepared rows; all of it cached.

    `seconds` receives the time of each stage.
    """
    seconds = {} if seconds is None else seconds
    _pieces(recipe, seconds)
    _rows(recipe, seconds)


def _pieces(recipe: GrpoRecipe | SftRecipe, seconds: dict[str, float]) -> None:
    """Build the embedded models that the recipe names, unless they are cached."""
    names = [recipe.model.name]
    if isinstance(recipe, GrpoRecipe) and recipe.feedback:
        names += [n for n in (recipe.feedback.model, recipe.served.model if recipe.served else None) if n]
    for stage in embedded.stages(names, recipe.seed):
        if stage.ready:
            continue
        with _timed(stage.title, seconds), embedded.building(stage) as folder:
            if folder is None:
                continue
            if stage.kind == "recipe":
                kind, _, name = stage.args[0].partition("/")
                run(kind, recipes.load(kind, name, stage.args[1:]), RunDir(folder))
            else:
                plan = launch.module_plan(*stage.args, str(folder / "final"))
                with _LogView(folder / "logs" / "launcher.log") as view:
                    launch.execute(plan, folder / "logs", watch=view.update)


def _rows(recipe: GrpoRecipe | SftRecipe, seconds: dict[str, float]) -> None:
    """Prepare the data of known sources once, before any rank asks for them."""
    from .data.load import ensure_rows

    wanted = [(recipe.data.path, recipe.data.split)]
    if recipe.data.heldout:
        wanted.append((recipe.data.heldout.path, recipe.data.heldout.split))
    start = time.monotonic()
    for path, split in wanted:
        ensure_rows(embedded.with_seed(path, recipe.seed), split)
    if time.monotonic() - start > 1:
        seconds["prepare data"] = round(time.monotonic() - start, 1)


def _launch(
    stage: str,
    recipe: GrpoRecipe | SftRecipe,
    where: RunDir,
    logs: Path,
    recipe_file: Path,
    resume: bool,
    seconds: dict[str, float],
) -> None:
    env = {"R1V_RECIPE": str(recipe_file)} | ({"R1V_RESUME": "1"} if resume else {})
    with launch.serving(recipe, logs) as served:
        base = launch.plan(stage, recipe, where.path)
        plan = replace(base, env={**base.env, **env, **served})
        if recipe.launch.node_rank == 0:
            run_dir.write_json(where.launch, _launch_document(plan))
        console.log(f"{stage}: {where.path}, {plan.processes} process(es) here, logs in {logs}")
        with _timed(stage, seconds), _View(stage, where) as view:
            launch.execute(plan, logs, watch=view.update)


def _launch_document(plan: launch.Plan) -> dict:
    """launch.json: how this attempt was started. The environment holds only what r1v itself set: no keys."""
    return {
        "command": shlex.join(["r1v", *sys.argv[1:]]),
        "argv": plan.argv,
        "env": plan.env,
        "versions": contract.versions(),
        "git_commit": contract.git_commit(),
        "started": round(time.time(), 3),
    }


class _View:
    """Follows metrics.jsonl and status.json of a run: a progress bar on a terminal, a line every 10 s elsewhere."""

    _SHOWN = (
        ("reward", "reward", "{:.3f}"),
        ("rewards/format/mean", "format", "{:.2f}"),
        ("completions/mean_length", "length", "{:.1f}"),
        ("loss", "loss", "{:.4g}"),
    )

    def __init__(self, stage: str, where: RunDir):
        self._stage, self._where = stage, where
        self._offset = where.metrics.stat().st_size if where.metrics.is_file() else 0
        self._samples: dict[Path, int] = {}
        self._bar = ExitStack()
        self._progress: console.Progress | None = None
        self._step = 0

    def __enter__(self) -> _View:
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()

    def update(self) -> None:
        """Show what was logged since the last call."""
        self._show_samples()
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
        if not path.is_file():
            return []
        size = path.stat().st_size
        if size < self._offset:  # a resumed run cut back what followed its checkpoint
            self._offset = 0
        with open(path, "rb") as f:
            f.seek(self._offset)
            data = f.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in data[:end].splitlines() if line.strip()]

    def _show_samples(self) -> None:
        path = self._where.logs / "samples.jsonl"
        if not path.is_file():
            return
        shown = self._samples.get(path, 0)
        for number, sample in run_dir.read_jsonl(path):
            if number > shown:
                self._samples[path] = number
                console.log("\n".join(f"  {key}: {value}" for key, value in sample.items()))


class _LogView:
    """Follows the progress that a module without a run dir writes into its log: `judge: 30/250 loss 0.5`."""

    def __init__(self, log: Path):
        self._log = log
        self._bar = ExitStack()
        self._progress: console.Progress | None = None
        self._step = 0

    def __enter__(self) -> _LogView:
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
    part = False
    for title, value in (summary.get("seconds") or {}).items():
        rows.append([f"  of it, {title}" if part else f"time, {title}", "", f"{value:.0f} s"])
        part = part or title in STAGES  # what the worker measured follows its stage
    return rows


def serve_reward(
    model: str, *, revision: str | None, host: str, port: int, devices: str | None, api_key_env: str | None
) -> None:
    """Become the reward server; does not return.

    Raises:
        UsageError: `devices` is not a list of indices, or the key's variable is not set.
    """
    if devices is not None:
        if not all(part.strip().isdigit() for part in devices.split(",")):
            raise UsageError(f"--devices {devices!r} is not a list of GPU indices", hint="for example --devices 6,7")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    if api_key_env is not None and not os.environ.get(api_key_env):
        raise UsageError(f"--api-key-env: the environment variable {api_key_env} is not set")
    argv = [sys.executable, "-m", "r1vfree_cli.rewards.server", "--model", model, "--host", host, "--port", str(port)]
    argv += ["--revision", revision] if revision else []
    argv += ["--api-key-env", api_key_env] if api_key_env else []
    os.execv(sys.executable, argv)


def merge(checkpoint: Path, out: Path, *, base: str | None, dtype: str | None, overwrite: bool) -> dict:
    """Merge in a process of its own (it loads the model three times); returns its summary."""
    args = [str(checkpoint), str(out)]
    args += ["--base", base] if base else []
    args += ["--dtype", dtype] if dtype else []
    args += ["--overwrite"] if overwrite else []
    return launch.run_json(launch.module_plan("r1vfree_cli.training.merge", *args))
