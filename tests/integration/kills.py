"""Runs that are killed and resumed, for the tests and for `tests/bench/kill_loop.py`.

A worker is forked from a server that has torch and the rest imported, so that an attempt takes seconds; `cli` starts
the same run through the real command line and launcher. Rewards are made up (`grpo_worker`). Kills are SIGKILL, at a
moment that is seen from outside in the files of the run dir.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from safetensors.torch import load_file

from r1vfree_cli.config import recipes
from r1vfree_cli.core.files import read_json, read_jsonl
from r1vfree_cli.run.attempt import Attempt
from r1vfree_cli.run.run_dir import RunDir

HERE = Path(__file__).parent
LIMIT_S = 240.0
_NOT_COMPARED = ("step_time", "judge/latency_p95")

Moment = Callable[[RunDir], bool]


def document(home: Path, stage: str = "grpo", **changes) -> dict:
    """A recipe of 8 steps that walks twice through 8 rows; `changes` go into `train`, keys with a dot elsewhere."""
    doc: dict = {
        "model": {"name": str(home / "model"), "dtype": "float32", "min_pixels": 784, "max_pixels": 56 * 56},
        "data": {"path": str(home / "data")},
        "train": {
            "max_steps": 8,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 2,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "report_to": "none",
        },
        "launch": {"preset": "cpu"},
    }
    if stage == "grpo":
        doc["rewards"] = [{"name": "format", "weight": 0.5}, {"name": "accuracy"}]
        doc["train"] |= {"num_generations": 4, "prompts_per_device": 2, "beta": 0.04, "max_completion_length": 8}
    else:
        doc["train"] |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    for key, value in changes.items():
        node, _, name = key.rpartition(".")
        (doc[node] if node else doc["train"])[name] = value
    return doc


def write_recipe(home: Path, name: str, doc: dict) -> Path:
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(doc))
    return path


# --- attempts --------------------------------------------------------------------------------------------------


def preload() -> multiprocessing.context.ForkServerContext:
    """The context whose processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["r1vfree_cli.training.grpo", "r1vfree_cli.training.sft", "deepspeed"])
    return context


def attempt(context, stage: str, recipe: Path, where: Path, env: dict[str, str] | None = None):
    """Start one attempt, a resume where there is a run already; returns its process, not a child of this one."""
    process = context.Process(target=_worker, args=(stage, str(recipe), str(where), dict(env or {})), daemon=True)
    process.start()
    return process


def _worker(stage: str, recipe_file: str, where: str, env: dict[str, str]) -> None:
    """What `jobs.run` and the launcher do, without them: claim the run dir and be its only rank."""
    import clock_back
    import grpo_worker

    from r1vfree_cli.training import grpo, sft
    from r1vfree_cli.training.worker import worker

    run = RunDir(where)
    recipe = recipes.load(stage, recipe_file)
    resume = run.holds_run
    run.begin(recipes.to_yaml(recipe), resume=resume)
    os.environ.update({"ACCELERATE_USE_CPU": "true"} | env)
    clock_back.apply()
    Attempt.of(run, resume=resume).write(run.path)
    grpo.build_rewards = grpo_worker.build
    if "R1V_TEST_FILE_LIMIT" in env:  # bytes a file may have: what a full disk does to whoever writes
        limit = int(env["R1V_TEST_FILE_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["worker", where]
    worker(stage, {"grpo": grpo.main, "sft": sft.main}[stage])


# The command line as it is, but for the rewards.
_CLI = f"""
import sys
from dataclasses import replace
sys.path.insert(0, {str(HERE)!r})
import clock_back
from r1vfree_cli import cli
from r1vfree_cli.launch import plan as plans
plan = plans.plan
def with_rewards(stage, recipe, where):
    found = plan(stage, recipe, where)
    return replace(found, argv=[*found.argv[:-3], {str(HERE / "grpo_worker.py")!r}, str(where)])
plans.plan = with_rewards
clock_back.apply()
cli.main()
"""


def cli(recipe: Path, where: Path, *more: str, env: dict[str, str] | None = None, **kwargs) -> subprocess.Popen:
    """`r1v grpo` with the rewards of `grpo_worker`, in a session of its own; both its streams go to `where`.log."""
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    with open(f"{where}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _CLI, "grpo", "--recipe", str(recipe), "--run-dir", str(where), *more],
            env=os.environ | {"PYTHONPATH": path} | (env or {}),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **kwargs,
        )


# --- processes -------------------------------------------------------------------------------------------------


def tree(pid: int) -> list[int]:
    """A process and all below it, by parent, whatever their session."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def kill_tree(pid: int) -> list[int]:
    """SIGKILL to a process and all below it, none of which sees another one die first; returns their ids."""
    stopped: list[int] = []
    while new := [p for p in tree(pid) if p not in stopped]:
        for p in new:
            _signal(p, signal.SIGSTOP)
        stopped += new
    for p in stopped:
        _signal(p, signal.SIGKILL)
    return stopped


def alive(pids: list[int]) -> list[int]:
    """Those that still run."""
    return [p for p in pids if p in tree(p) and _state(p) not in ("Z", "X", None)]


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def until(condition: Callable[[], bool], *, pause: float = 0.0005, limit: float = LIMIT_S) -> bool:
    """Wait for `condition`, looking again and again; returns whether it came true in time."""
    deadline = time.monotonic() + limit
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
    return found


# --- moments ---------------------------------------------------------------------------------------------------


def logged(step: int) -> Moment:
    """Just after `step` was logged."""
    return lambda run: run.metrics.is_file() and run.metrics.read_bytes().count(b"\n") >= step


def rollouts_of(step: int) -> Moment:
    """After the rollouts of `step` were written, before it was logged."""
    return lambda run: (run.rollouts / f"step-{step:08d}.parquet").exists()


def writing(file: str, step: int = 0) -> Moment:
    """While a checkpoint is being written, once `file` of it is there (not before `step` was logged)."""
    return lambda run: logged(step)(run) and any((run.checkpoints / ".writing").glob(f"*/{file}"))


def whole(step: int) -> Moment:
    """When the checkpoint of `step` has just got its name; nothing after it is done."""
    return lambda run: (run.checkpoints / f"checkpoint-{step}").exists()


def deleting(run: RunDir) -> bool:
    """While an old checkpoint is being deleted."""
    return any(run.checkpoints.glob(".old-*"))


def either(*moments: Moment) -> Moment:
    """Whichever comes first."""
    return lambda run: any(moment(run) for moment in moments)


def final_writing(run: RunDir) -> bool:
    """While the trained model is being written."""
    return (run.path / ".final-writing" / "model.safetensors").exists()


# --- the comparison --------------------------------------------------------------------------------------------


def killed_at(process, run: RunDir, moment: Moment, after: float = 0.0) -> bool:
    """SIGKILL an attempt `after` seconds behind a moment; False when it had ended before."""
    until(lambda: moment(run) or process.exitcode is not None)
    if after:
        process.join(after)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def weights(folder: Path) -> dict:
    """Name -> array of every tensor of a model folder, as 64-bit numbers."""
    return {k: v.double().numpy() for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def differences(run: RunDir, whole_run: RunDir, tolerance: float = 0.0) -> list[str]:
    """In what a finished run differs from the uninterrupted one; [] when it is the same.

    Final weights (to `tolerance`, by default bit for bit), every line of the metrics but its times, every rollout
    with its prompt, completion, rewards and advantage, the summary's figures.
    """
    found = []
    if run.status.get("state") != "finished":
        return [f"state is {run.status.get('state')}: {run.status.get('reason')}"]
    ours, theirs = weights(run.final), weights(whole_run.final)
    if ours.keys() != theirs.keys():
        found.append("other tensors")
    worst = max(float(abs(ours[k] - theirs[k]).max()) for k in theirs if k in ours)
    if worst > tolerance:
        found.append(f"weights differ by up to {worst:.3g}")
    lines, expected = ([_comparable(d) for _, d in read_jsonl(r.metrics)] for r in (run, whole_run))
    if [d["step"] for d in lines] != [d["step"] for d in expected]:
        found.append(f"steps logged: {[d['step'] for d in lines]}")
    for a, b in zip(lines, expected, strict=False):
        keys = [k for k in a.keys() | b.keys() if not _close(a.get(k), b.get(k), tolerance)]
        if keys:
            found.append(f"step {a['step']}: other {', '.join(sorted(keys))}")
    ours_of, theirs_of = (sorted(p.name for p in r.rollouts.glob("*")) for r in (run, whole_run))
    if ours_of != theirs_of:
        found.append(f"rollouts: {ours_of}")
    for name in sorted({*ours_of} & {*theirs_of}):
        a, b = (pq.read_table(r.rollouts / name).to_pydict() for r in (run, whole_run))
        columns = [c for c in b if a.get(c) != b[c] and not (tolerance and c == "advantage")]
        if columns:
            found.append(f"{name}: other {', '.join(columns)}")
    summaries = [read_json(r.summary) for r in (run, whole_run)]
    for key in ("steps", "rows", "dropped", "reward", "loss"):
        if tolerance == 0 and summaries[0].get(key) != summaries[1].get(key):
            found.append(f"summary: other {key}")
    left = [p.name for p in (*run.checkpoints.glob(".*"), *run.path.glob(".*"))]
    return found + ([f"left behind: {left}"] if left else [])


def _comparable(line: dict) -> dict:
    return {k: v for k, v in line.items() if k not in _NOT_COMPARED}


def _close(a, b, tolerance: float) -> bool:
    if tolerance and isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance * max(1.0, abs(b))
    return a == b


def show(run: RunDir) -> str:
    """The last attempt's log and status, for a failed test."""
    log = run.logs / "rank-0.log"
    text = log.read_text(errors="replace")[-3000:] if log.is_file() else ""
    return f"{json.dumps(run.status)}\n{text}"
