"""`r1v sft` and `r1v grpo`, from a recipe's name to a finished run dir: what the CLI calls for both."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import embedded, recipes
from ..config.schema import Recipe
from ..core import console, files
from ..core import process as ranks
from ..core.errors import GuardStop, Interrupted, R1VError, UsageError, counted
from ..run import contract, run_dir
from ..run.attempt import Attempt
from ..run.checkpoint import adapter_base, checkpoints, lacking, resolve
from ..run.run_dir import RunDir
from . import plan as plans
from . import preflight, watch
from . import processes as launch


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

    Raises UsageError: recipe, machine or run dir. DataError: data or checkpoint. GuardStop: training stopped itself.
    Interrupted: SIGINT or SIGTERM.
    """
    recipe = recipes.load(stage, name, overrides)
    where = RunDir(path or Path("runs") / Path(name).stem)
    findings = preflight.check(recipe, dry_run=dry_run, where=where.path)
    if dry_run:
        return _dry_run(recipe, findings, plans.plan(stage, recipe, where.path))
    if found := findings.errors:
        raise UsageError(f"recipe {name} cannot run here", details=found, hint="--dry-run shows the resolved run")
    for line in findings.warnings:
        console.warn(line)
    resume = resume or _unfinished(where, recipe, overwrite)
    commit = contract.git_commit(recipes.find(stage, name).parent)
    before = 0 if overwrite else _kept(where)
    try:
        return run(stage, recipe, where, resume=resume, overwrite=overwrite, commit=commit)
    except Interrupted:
        raise _interrupted(where, before) from None


def _kept(where: RunDir) -> int:
    """The step of the newest complete checkpoint; 0 for none."""
    return max((step for step, path in checkpoints(where.checkpoints) if not lacking(path, verify=False)), default=0)


def _interrupted(where: RunDir, before: int) -> Interrupted:
    """What a person reads who pressed Ctrl-C: what is kept, and the command that goes on.

    `before`: the newest checkpoint's step when the command began; a clock may be set back.
    """
    step = _kept(where)
    message = f"interrupted after checkpoint {step}" if step else "interrupted before the first checkpoint"
    if step > before:
        message = f"interrupted: checkpoint at step {step} saved"
    again = [a for a in sys.argv[1:] if a not in ("--overwrite", "--resume")]
    return Interrupted(message, hint=f"to go on: {shlex.join(['r1v', *again, '--resume'])}")


def _dry_run(recipe: Recipe, findings: preflight.Findings, plan: plans.Plan) -> dict:
    server = None
    try:
        if recipe.served:  # a run without serve.port takes one that is free then
            server = plans.server_plan(recipe, recipe.served.port or 8000)
    except UsageError as e:  # no vLLM on this machine, no hub
        if not findings.errors:
            findings.unchecked.append(f"the command of the reward server: {e.message}")
    return {
        "recipe": recipe.model_dump(mode="json"),
        "command": shlex.join(plan.argv),
        "env": plan.env,
        "processes_here": plan.processes,
        "server": {"command": shlex.join(server.argv), "env": server.env} if server else None,
    } | {name: getattr(findings, name) for name in ("errors", "warnings", "unchecked")}


def _unfinished(where: RunDir, recipe: Recipe, overwrite: bool) -> bool:
    """True when the folder holds a run of this very recipe that did not finish; says so."""
    if overwrite or not where.recipe.is_file() or recipe.launch.node_rank:
        return False
    state = where.status.get("state")
    if state == run_dir.FINISHED or where.recipe.read_bytes() != recipes.to_yaml(recipe).encode("utf-8"):
        return False
    console.log(f"{where.path} holds an unfinished run of this recipe ({state or 'not started'}): resuming it")
    return True


def run(
    stage: str,
    recipe: Recipe,
    where: RunDir,
    *,
    resume: bool = False,
    overwrite: bool = False,
    commit: str | None = None,
    trial: bool = False,
) -> dict:
    """Run a resolved recipe in a run dir: models and data it needs, then the workers. Returns the summary.

    `commit`: of the repository that holds the recipe, for the run contract. `trial`: one step on what needs most memory.
    """
    node = recipe.launch.node_rank
    with files.lock(where.path, "run dir") if node == 0 else nullcontext():
        if node == 0:
            if where.holds_run:
                ranks.end_orphans(where.logs)
            if resume:
                _tell_changes(where, stage, recipe)
            where.begin(recipes.to_yaml(recipe), resume=resume, overwrite=overwrite)
            folder, logs = where.path, where.logs
        else:
            # Node 0 owns the run dir; the others keep their recipe and logs apart.
            folder = logs = where.path / "nodes" / str(node)
            ranks.end_orphans(logs)
            for old in logs.glob("rank-*.error.json"):  # of an earlier attempt: its cause is not this one's
                old.unlink()
            files.write_text(folder / "recipe.yaml", recipes.to_yaml(recipe))
        attempt = Attempt(str(where.path), str(logs), resume, os.getpid(), commit, trial=trial)
        try:
            _launch(stage, recipe, where, folder, attempt)
        except BaseException as e:
            error = Interrupted("interrupted") if isinstance(e, KeyboardInterrupt) else e
            if node == 0:
                _failed(where, error)
            raise error from error.__cause__
        return {"run_dir": str(where.path)} | ({"node": node} if node else files.read_json(where.summary))


def _tell_changes(where: RunDir, stage: str, recipe: Recipe) -> None:
    """Say what of the recipe a resume changes. Raises UsageError: the run is SFT and this GRPO, or the other way."""
    if not where.recipe.is_file():
        return
    before = recipes.load_document(where.recipe)
    kind = "grpo" if "rewards" in before else "sft"
    if kind != stage:
        what = f"{where.path} holds a run of r1v {kind}, which r1v {stage} cannot resume"
        raise UsageError(what, hint="choose another --run-dir")
    for line in recipes.differences(before, recipe.model_dump(mode="json")):
        console.warn(f"the resumed run has another recipe: {line}")


def _failed(where: RunDir, error: BaseException) -> None:
    state = run_dir.STOPPED if isinstance(error, GuardStop) else run_dir.FAILED
    state = run_dir.INTERRUPTED if isinstance(error, Interrupted) else state
    try:
        where.set_status(state, reason=error.message if isinstance(error, R1VError) else repr(error))
    except R1VError as e:  # a full disk, most likely: the error itself is what matters
        console.warn(e.message)


@contextmanager
def _timed(title: str, seconds: dict[str, float]) -> Iterator[None]:
    console.log(f"{title} ...")
    start = time.monotonic()
    yield
    seconds[title] = round(time.monotonic() - start, 1)
    console.log(f"{title}: {seconds[title]:.0f} s")


def prepare(recipe: Recipe) -> dict[str, float]:
    """Make what the recipe needs and this machine lacks, before any rank asks for it: embedded models, prepared rows.

    All of it is cached. Returns the seconds that each stage of it took.
    """
    from ..data.load import ensure_rows

    seconds: dict[str, float] = {}
    _pieces(recipe, seconds)
    start = time.monotonic()
    for rows in filter(None, (recipe.data, recipe.data.heldout)):
        ensure_rows(embedded.with_seed(rows.path, recipe.seed), rows.split)
    if time.monotonic() - start > 1:
        seconds["prepare data"] = round(time.monotonic() - start, 1)
    return seconds


def _pieces(recipe: Recipe, seconds: dict[str, float]) -> None:
    """Build the embedded models that the recipe names, unless they are cached."""
    judges = [judge.serve.model if judge.serve else judge.model for judge in recipe.every_judge]
    for stage in embedded.stages([recipe.model.name, *judges], recipe.seed):
        if stage.ready:
            continue
        with _timed(stage.title, seconds), embedded.building(stage) as folder:
            if folder is None:
                continue
            if stage.kind == "recipe":
                kind, _, name = stage.args[0].partition("/")
                commit = contract.git_commit(recipes.find(kind, name).parent)
                run(kind, recipes.load(kind, name, stage.args[1:]), RunDir(folder), commit=commit)
            else:
                plan = plans.module_plan(*stage.args, str(folder / "final"))
                with watch.LogView(folder / "logs" / "launcher.log") as view:
                    launch.execute(plan, folder / "logs", watch=view.update)


def _launch(stage: str, recipe: Recipe, where: RunDir, folder: Path, attempt: Attempt) -> None:
    seconds = prepare(recipe)
    logs = Path(attempt.logs)
    with launch.serving(recipe, logs) as server:
        plan = plans.plan(stage, recipe, folder)
        url = server.url if server else None
        replace(attempt, reward_url=url, seconds=seconds, launched=time.monotonic()).write(folder)
        if recipe.launch.node_rank == 0:
            # How this attempt was started. The environment holds only what r1v itself set: no keys.
            started: dict[str, Any] = {
                "command": shlex.join(["r1v", *sys.argv[1:]]),
                "argv": plan.argv,
                "env": plan.env,
            }
            started |= {"versions": contract.versions(), "git_commit": attempt.git_commit}
            files.write_json(where.launch, started | {"started": round(time.time(), 3)})
        console.log(f"{where.path}: starting {counted(plan.processes, 'process')} here, logs in {logs}")
        with _timed(stage, seconds), watch.RunView(stage, where) as view:

            def look() -> None:
                view.update()
                if server:
                    server.watch()

            launch.execute(plan, logs, watch=look)


def serve_reward(model: str, *, devices: str | None = None, **options: Any) -> None:
    """Become the reward server, of which `options` are the command's; does not return."""
    if devices is not None:
        if not all(part.strip().isdigit() for part in devices.split(",")):
            raise UsageError(f"--devices {devices!r} is not a list of GPU indices", hint="for example --devices 6,7")
        os.environ["CUDA_VISIBLE_DEVICES"] = ranks.gpu_names(map(int, devices.split(",")))
    given = {"model": model, "port": 8100} | {name: value for name, value in options.items() if value is not None}
    plan = plans.module_plan("r1vfree_cli.judges.server", *plans.flags(**given))
    os.execve(plan.argv[0], plan.argv, os.environ | plan.env)


def merge(checkpoint: Path, out: Path, *, base: str | None, dtype: str | None, overwrite: bool) -> dict:
    """Merge in a process of its own (it loads the model three times); returns its summary."""
    found = resolve(str(checkpoint), verify=False, shards=True)  # before torch is imported
    if found.kind == "adapter":
        adapter_base(found.path, base)
    flags = plans.flags(base=base, dtype=dtype, overwrite=overwrite)
    plan = plans.module_plan("r1vfree_cli.training.merge", str(checkpoint), str(out), *flags)
    # Its stderr is the user's: no warnings between libraries, no search for an accelerator.
    return launch.run_json(replace(plan, env=plan.env | {"PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}))
