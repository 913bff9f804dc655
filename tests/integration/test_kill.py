"""Runs killed at any moment and resumed are, to the bit, the run that nobody killed."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import kills
import pyarrow.parquet as pq
import pytest
from kills import either, final_writing, logged, rollouts_of, whole, writing
from tiny_models import draw_rows, save_tiny, write_rows

from r1vfree_cli.core import process as ranks
from r1vfree_cli.core.files import read_json
from r1vfree_cli.run.checkpoint import checkpoints
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training.recorder import rollout_file

SEED = 7


class Runs:
    """One recipe, its uninterrupted run, and attempts at the same in another folder."""

    def __init__(self, home: Path, context, stage: str = "grpo", name: str = "plain", **changes):
        self.home, self.context, self.stage = home, context, stage
        self.recipe = kills.write_recipe(home, name, kills.document(home, stage, **changes))
        self.whole = RunDir(home / f"{name}-whole")
        self.finish(self.whole)

    def start(self, run: RunDir, **env: str):
        return kills.attempt(self.context, self.stage, self.recipe, run.path, env)

    def finish(self, run: RunDir) -> None:
        process = self.start(run)
        process.join(kills.LIMIT_S)
        assert process.exitcode == 0, kills.show(run)

    def same(self, run: RunDir, tolerance: float = 0.0) -> None:
        found = kills.differences(run, self.whole, tolerance)
        assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    save_tiny(root / "model")
    write_rows(root / "data", draw_rows(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R1V_CACHE", str(root / "cache"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]))
        yield root


@pytest.fixture(scope="module")
def context(home):
    return kills.preload()


@pytest.fixture(scope="module")
def plain(home, context) -> Runs:
    """8 steps, two walks through the rows, a checkpoint every 2 steps, 2 kept."""
    return Runs(home, context)


def test_killed_at_any_moment_and_resumed_it_is_the_same_run(plain, tmp_path):
    run, rng = RunDir(tmp_path / "run"), random.Random(SEED)
    moments = [
        (rollouts_of(1), 0.0),  # before there is anything to resume from
        (writing("model.safetensors"), 0.0),
        (writing("optimizer.pt", 2), 0.0),
        (whole(2), 0.0),  # a checkpoint, and a status that does not know of it
        (logged(3), rng.uniform(0, 0.3)),  # generation, forward, backward: wherever it is
        (either(kills.deleting, whole(6)), 0.0),
        (logged(7), rng.uniform(0, 0.3)),
        (final_writing, 0.0),
    ]
    killed = sum(kills.killed_at(plain.start(run), run, moment, after) for moment, after in moments)
    assert killed >= 6 and run.attempt >= 6
    if run.status["state"] != "finished":
        plain.finish(run)
    plain.same(run)
    assert [step for step, _ in checkpoints(run.checkpoints)] == [6, 8]
    first, second = rows_of(run, range(1, 5)), rows_of(run, range(5, 9))
    assert sorted(first) == sorted(second) == [f"row-0-{i}" for i in range(8)] and first != second


def rows_of(run: RunDir, steps: range) -> list[str]:
    """Ids of the rows that some steps trained on, in their order, one for each group."""
    return [i for step in steps for i in pq.read_table(rollout_file(run, step)).column("id").to_pylist()[::4]]


def test_killed_between_two_steps_that_share_a_generated_batch(home, context, tmp_path):
    """The batch, the micro-step, the figures since the last logged step and a reference policy that follows the trained
    one are in the checkpoint, a signal's too. In bfloat16: the checkpoint keeps the 32 bits that the optimizer needs."""
    runs = Runs(
        home,
        context,
        name="cycle",
        prompts_per_device=1,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        save_steps=1,
        logging_steps=3,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        **{"model.dtype": "bfloat16"},
    )
    assert {p.stem for p in runs.whole.rollouts.glob("*")} == {"step-00000001", "step-00000005"}  # 4 steps share one
    run = RunDir(tmp_path / "run")
    assert kills.killed_at(runs.start(run), run, whole(1))
    process = runs.start(run)
    kills.until(lambda: logged(1)(run))  # step 3
    process.terminate()
    process.join(60)
    assert process.exitcode == 130 and run.status["state"] == "interrupted"
    assert kills.killed_at(runs.start(run), run, whole(6))
    runs.finish(run)
    runs.same(run)


def test_sft_killed_and_resumed_is_the_same_run(home, context, tmp_path):
    runs = Runs(home, context, "sft", "sft", **{"model.dtype": "bfloat16"})
    run = RunDir(tmp_path / "run")
    for moment in (writing("model.safetensors"), whole(2), logged(5), final_writing):
        kills.killed_at(runs.start(run), run, moment)
    if run.status["state"] != "finished":
        runs.finish(run)
    runs.same(run)
    assert run.attempt >= 4


def test_a_run_that_saves_models_only_is_bounded_on_disk_and_not_resumed(home, context, tmp_path):
    recipe = kills.document(home, "sft", save_only_model=True, save_total_limit=1, save_steps=1)
    path = kills.write_recipe(home, "models", recipe)
    run = RunDir(tmp_path / "run")
    process = kills.attempt(context, "sft", path, run.path)
    assert kills.killed_at(process, run, whole(4))
    assert len(checkpoints(run.checkpoints)) <= 2  # one more while it is exchanged
    process = kills.attempt(context, "sft", path, run.path)
    process.join(60)
    error = read_json(run.logs / "rank-0.error.json")
    assert process.exitcode == 2 and "save_only_model" in error["message"] and "--overwrite" in error["hint"]


def test_a_full_disk_stops_with_the_reason_and_leaves_the_last_checkpoint(plain, tmp_path):
    run = RunDir(tmp_path / "run")
    assert kills.killed_at(plain.start(run), run, whole(2))
    process = plain.start(run, R1V_TEST_FILE_LIMIT="1000000")  # the weights fit, the optimizer's state does not
    process.join(60)
    error = read_json(run.logs / "rank-0.error.json")
    assert process.exitcode == 2 and "no space left" in error["message"] and "checkpoint-4" in error["message"]
    assert [step for step, _ in checkpoints(run.checkpoints)] == [2] and not list(run.checkpoints.glob(".*"))
    plain.finish(run)
    plain.same(run)


def test_the_highest_step_is_resumed_whatever_the_clock_says(plain, tmp_path):
    run = RunDir(tmp_path / "run")
    assert kills.killed_at(plain.start(run), run, whole(4))
    for step, moment in ((2, 4e9), (4, 1.0)):
        folder = run.checkpoints / f"checkpoint-{step}"
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (moment, moment))
    process = plain.start(run, R1V_TEST_CLOCK="back")
    process.join(kills.LIMIT_S)
    assert process.exitcode == 0 and "resuming from step 4" in (run.logs / "said.jsonl").read_text()
    plain.same(run)


# --- the real command ------------------------------------------------------------------------------------------


def test_the_command_resumes_after_a_kill_and_after_a_signal_to_all_its_processes(plain, tmp_path):
    run = RunDir(tmp_path / "run")
    r1v = kills.cli(plain.recipe, run.path)
    assert kills.until(lambda: writing("optimizer.pt")(run) or r1v.poll() is not None, pause=0.002)
    pids = kills.kill_tree(r1v.pid)
    r1v.wait()
    assert len(pids) == 3 and kills.until(lambda: not kills.alive(pids), limit=10)

    done = run.metrics.read_bytes().count(b"\n")
    r1v = kills.cli(plain.recipe, run.path, "--resume")
    assert kills.until(lambda: (run.attempt == 2 and logged(done + 1)(run)) or r1v.poll() is not None, pause=0.01)
    # As a scheduler does it: to r1v, to the launcher and to the rank.
    for pid in (pids := kills.tree(r1v.pid)):
        os.kill(pid, signal.SIGTERM)
    assert r1v.wait(60) == 130 and len(pids) == 3 and not kills.alive(pids)
    state = run.status
    assert state["state"] == "interrupted"
    assert (run.checkpoints / f"checkpoint-{state['step']}" / "optimizer.pt").is_file()

    assert kills.cli(plain.recipe, run.path).wait(kills.LIMIT_S) == 0  # the same command again
    plain.same(run)
    log = Path(f"{run.path}.log").read_text()
    assert "holds an unfinished run of this recipe (interrupted): resuming it" in log
    assert "a checkpoint that was being written when the run ended is skipped" in log  # rank 0's words, repeated
    assert f"interrupted: checkpoint at step {state['step']} saved" in log and "--resume\n" in log
    assert f"resuming from step {state['step']}: " in log
    assert read_json(run.summary)["seconds"]["grpo"] > 0
    assert not ranks.running(run.logs)


def test_stopped_for_a_while_under_a_clock_that_goes_back_it_is_the_same_run(plain, tmp_path):
    """SIGSTOP to all of it, as a batch system suspends a job: nobody takes its run dir, and it ends as if never stopped."""
    run = RunDir(tmp_path / "run")
    r1v = kills.cli(plain.recipe, run.path, env={"R1V_TEST_CLOCK": "back"})
    assert kills.until(lambda: logged(2)(run) or r1v.poll() is not None, pause=0.01)
    pids = kills.tree(r1v.pid)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
        for more in ((), ("--resume",), ("--overwrite",)):
            assert kills.cli(plain.recipe, run.path, *more).wait(60) == 2
        log = Path(f"{run.path}.log").read_text()
        assert log.count(f"another r1v process (pid {r1v.pid}) is using the run dir") == 3
        assert before == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert len(pids) == 3 and r1v.wait(kills.LIMIT_S) == 0, kills.show(run)
    plain.same(run)


def test_two_processes_under_zero3_killed_twice_are_the_same_run(home, tmp_path):
    """Killed in a checkpoint, all of it, then r1v alone: its ranks write a checkpoint and go. To the bit: a sum of two
    ranks' numbers has one order."""
    layout = {"launch.preset": "zero3", "launch.processes": 2, "launch.device": "cpu"}
    recipe = kills.write_recipe(home, "zero3", kills.document(home, prompts_per_device=1, **layout))
    uninterrupted, run = RunDir(tmp_path / "whole"), RunDir(tmp_path / "run")
    assert kills.cli(recipe, uninterrupted.path).wait(kills.LIMIT_S) == 0, kills.show(uninterrupted)

    r1v = kills.cli(recipe, run.path)
    assert kills.until(lambda: writing("*", 3)(run) or r1v.poll() is not None, pause=0.01)
    pids = kills.kill_tree(r1v.pid)
    assert r1v.wait() == -signal.SIGKILL and len(pids) == 4  # r1v, the launcher, two ranks
    assert kills.until(lambda: not kills.alive(pids), pause=0.1, limit=30)
    assert run.status["state"] == "running" and checkpoints(run.checkpoints)

    r1v = kills.cli(recipe, run.path)
    again = {"state": "running", "attempt": 2}
    in_second_epoch = logged(5)
    assert kills.until(
        lambda: (again.items() <= run.status.items() and in_second_epoch(run)) or r1v.poll() is not None, pause=0.01
    )
    pids = kills.tree(r1v.pid)
    r1v.kill()
    assert r1v.wait() == -signal.SIGKILL and len(pids) == 4
    assert kills.until(lambda: not kills.alive(pids), pause=0.1, limit=60)
    state = run.status
    assert state["state"] == "interrupted" and state["step"] == checkpoints(run.checkpoints)[-1][0] in range(5, 8)

    assert kills.cli(recipe, run.path).wait(kills.LIMIT_S) == 0, kills.show(run)
    found = kills.differences(run, uninterrupted)
    assert not found, "\n".join(found)
