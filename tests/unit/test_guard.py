"""The collapse guard's figures and decisions, and the files that GRPO leaves: no torch."""

import json
import math
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from r1vfree_cli.config.schema import Guard
from r1vfree_cli.core.files import append_jsonl, read_json
from r1vfree_cli.run.run_dir import RunDir
from r1vfree_cli.training.guard import CollapseGuard, StepFigures, correlation, figures, offenders
from r1vfree_cli.training.recorder import (
    Recorder,
    Rollout,
    rollout_file,
    spread_over_groups,
    summarise_metrics,
    truncate_rollouts,
    update_summary,
    write_rollouts,
)

GROUP = 4


def rollout(i: int, *, completion: str | None = None, reward: float | None = 0.0, tokens: int = 5, **kwargs) -> Rollout:
    text = f"<think>a</think><answer>{i}</answer>" if completion is None else completion
    values = {"step": 1, "group": i // GROUP, "id": f"row-{i // GROUP}", "prompt": "What colour?", "clipped": False}
    values |= {"rewards": {"format": 1.0, "feedback": reward}} | kwargs
    return Rollout(completion=text, reward=reward, tokens=tokens, **values)


def step(number: int = 1, **values) -> StepFigures:
    healthy = {"loss": 0.1, "grad_norm": 1.0, "zero_spread": 0.2, "clipped": 0.1, "duplicates": 0.1}
    return StepFigures(number, **(healthy | {"length_correlation": 0.0} | values))


def measure(rollouts):
    return figures(1, rollouts, loss=0.0, grad_norm=1.0)


def test_figures_of_healthy_groups():
    found = measure([rollout(i, reward=i % 3, tokens=i) for i in range(8)])
    assert (found.zero_spread, found.clipped, found.duplicates) == (0.0, 0.0, 0.0)
    assert found.length_correlation == pytest.approx(np.corrcoef([i % 3 for i in range(8)], range(8))[0, 1])


def test_zero_spread_counts_groups_of_equal_scored_rewards():
    rewards = [1.0] * 4 + [1.0, 1.0, 1.0, 0.5] + [0.3, None, None, 0.3] + [None, None, None, 0.9]
    assert measure([rollout(i, reward=r) for i, r in enumerate(rewards)]).zero_spread == 0.75


def test_an_unscored_rollout_is_not_a_zero_to_the_guard():
    # With None as 0 this group would have a spread.
    rewards = [0.5, 0.5, None, 0.5]
    assert measure([rollout(i, reward=r) for i, r in enumerate(rewards)]).zero_spread == 1.0


def test_duplicates_are_counted_within_a_group_and_can_reach_all():
    same = [rollout(i, completion="x") for i in range(4)] + [rollout(i) for i in range(4, 8)]
    assert measure(same).duplicates == 0.5
    # A few short answers in a group are what a question about shapes has; one and the same is a collapse.
    few = [rollout(i, completion=("circle", "square")[i % 2]) for i in range(8)]
    assert measure(few).duplicates == pytest.approx(2 / 3)
    # The same text for other questions is no duplicate: short answers repeat.
    across = [rollout(i, completion=f"answer {i % GROUP}") for i in range(8)]
    assert measure(across).duplicates == 0.0
    assert measure([rollout(i, completion="x") for i in range(8)]).duplicates == 1.0


def test_the_same_group_number_in_two_steps_is_two_groups():
    first = [rollout(i, completion=f"{i}", step=1) for i in range(4)]
    second = [rollout(i, completion=f"{i}", step=2) for i in range(4)]
    assert measure(first + second).duplicates == 0.0


def test_correlation_matches_numpy_and_is_none_when_undefined():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(size=50) * 1e3 + 7
    assert correlation(list(zip(x, y, strict=True))) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert correlation([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]) is None
    assert correlation([(1.0, 2.0), (2.0, 3.0)]) is None


@pytest.mark.parametrize("name", ["zero_spread", "clipped", "duplicates"])
def test_a_threshold_must_hold_for_patience_steps_in_a_row(name):
    guard = CollapseGuard(Guard(patience=3))
    bad, good = {name: 0.95}, {name: 0.9499}
    assert [guard.observe(step(i, **v)).stop is None for i, v in enumerate([bad, bad, good, bad, bad])] == [True] * 5
    verdict = guard.observe(step(6, **bad))
    assert verdict.figure == name
    assert "3 logged steps" in verdict.stop and "95%" in verdict.stop


def test_a_resumed_run_goes_on_counting_but_after_a_stop_it_has_its_patience_again():
    def resumed(guard):
        other = CollapseGuard(guard.settings)
        other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        return other

    first = CollapseGuard(Guard(patience=3))
    assert [first.observe(step(i, clipped=1.0)).stop for i in (1, 2)] == [None, None]
    second = resumed(first)
    assert second.observe(step(3, clipped=1.0)).figure == "clipped"
    third = resumed(second)
    assert [third.observe(step(i, clipped=1.0)).stop for i in (4, 5)] == [None, None]
    assert third.observe(step(6, clipped=1.0)).figure == "clipped"


@pytest.mark.parametrize("values", [{"loss": math.nan}, {"loss": math.inf}, {"grad_norm": math.nan}])
def test_nan_stops_at_once(values):
    verdict = CollapseGuard(Guard(patience=20)).observe(step(7, **values))
    assert verdict.figure == "nan" and "step 7" in verdict.stop


def test_unknown_figures_neither_stop_nor_keep_a_count():
    guard = CollapseGuard(Guard(patience=2))
    assert guard.observe(step(1, clipped=1.0)).stop is None
    assert guard.observe(StepFigures(2, None, None, None, None, None, None)).stop is None
    assert guard.observe(step(3, clipped=1.0)).stop is None


@pytest.mark.parametrize("r", [0.85, -0.85])
def test_length_correlation_warns_once_and_never_stops(r):
    guard = CollapseGuard(Guard(patience=2, length_correlation_warning=0.8))
    verdicts = [guard.observe(step(i, length_correlation=r)) for i in range(5)]
    assert [len(v.warnings) for v in verdicts] == [0, 1, 0, 0, 0]
    assert all(v.stop is None for v in verdicts)
    assert f"{r:.2f}" in verdicts[1].warnings[0]


def test_offenders_shows_the_rollouts_it_is_about():
    rollouts = [rollout(i, reward=None if i == 2 else 0.5 + i, clipped=i == 6) for i in range(8)]
    rollouts[5].completion = rollouts[6].completion = "again\nand again"
    assert ["row-1" in line and "again and again" in line for line in offenders(rollouts, "clipped")] == [True]
    assert all("row-1" in line for line in offenders(rollouts, "duplicates"))
    assert "feedback not scored" in offenders(rollouts, "unscored")[0]
    assert len(offenders(rollouts, None)) == 4


def test_rollouts_null_means_not_scored(tmp_path):
    run = RunDir(tmp_path)
    rollouts = [rollout(i, reward=None if i == 1 else 0.25, advantage=0.0 if i else None) for i in range(4)]
    rollouts[3].completion = "no tags"
    write_rollouts(run, 12, rollouts)
    table = pq.read_table(run.rollouts / "step-00000012.parquet")
    columns = ["step", "group", "id", "prompt", "completion", "answer", "rewards/format", "rewards/feedback"]
    assert set([*columns, "advantage"]) <= set(table.column_names)
    found = table.to_pydict()
    assert found["rewards/feedback"] == [0.25, None, 0.25, 0.25]
    assert found["rewards/format"] == [1.0] * 4
    assert found["reward"][1] is None and found["advantage"][0] is None
    assert found["answer"] == ["0", "1", "2", None]


def test_the_recorder_holds_each_rollout_once_until_it_was_logged(tmp_path):
    run, recorder = RunDir(tmp_path), Recorder()
    for number, completion in ((1, "a"), (1, "b"), (2, "c")):  # two generation batches in step 1
        recorder.add([rollout(i, completion=completion, step=number) for i in range(8)], GROUP)
    recorder.write(run)
    table = pq.read_table(rollout_file(run, 1)).to_pydict()
    assert table["group"] == [i // GROUP for i in range(16)] and table["completion"] == ["a"] * 8 + ["b"] * 8
    resumed = Recorder()
    resumed.load_state_dict(json.loads(json.dumps(recorder.state_dict())))
    rollout_file(run, 2).unlink()
    resumed.write(run)
    assert not rollout_file(run, 2).exists()  # was written before the checkpoint
    resumed.forget_after(1)  # step 2 was stopped half-way
    assert [r.step for r in resumed.take()] == [1] * 16 and resumed.take() == []
    assert [r.completion for r in recorder.batch] == ["c"] * 8  # what the optimizer is at, logged or not
    assert len(recorder.take()) == 24


def test_shown_rollouts_are_of_different_groups_first():
    shown = spread_over_groups([rollout(i) for i in range(8)], 3)
    assert [(r.group, r.completion[-10]) for r in shown] == [(0, "0"), (1, "4"), (0, "1")]


def test_a_resumed_run_forgets_later_rollouts_only(tmp_path):
    run = RunDir(tmp_path)
    for number in (1, 2, 3):
        write_rollouts(run, number, [rollout(0)])
    truncate_rollouts(run, 2)
    assert [p.name for p in sorted(run.rollouts.iterdir())] == [rollout_file(run, i).name for i in (1, 2)]


def test_summary_merges_what_was_measured_before_and_after(tmp_path):
    run = RunDir(tmp_path)
    update_summary(run, {"heldout_accuracy": {"greedy": {"before": 0.4}, "sampled": {"before": 0.3}}})
    update_summary(run, {"heldout_accuracy": {"greedy": {"after": 0.6}}, "steps": 3})
    assert read_json(run.summary) == {
        "heldout_accuracy": {"greedy": {"before": 0.4, "after": 0.6}, "sampled": {"before": 0.3}},
        "steps": 3,
    }


def test_summary_of_metrics_leaves_out_what_was_not_scored(tmp_path):
    run = RunDir(tmp_path)
    for i in range(1, 21):
        line = {"step": i, "loss": 0.1, "reward": float(i), "rewards/format/mean": 1.0}
        line |= {"judge/calls": 8, "judge/latency_p50": 0.5}
        append_jsonl(run.metrics, line | {"rewards/feedback/mean": None if i == 20 else 0.5})
    found = summarise_metrics(run)
    assert found["reward"] == {"first": 1.5, "last": 19.5, "steps_averaged": 2}
    assert found["rewards"]["feedback"] == {"first": 0.5, "last": 0.5}
    assert found["format_rate"] == {"first": 1.0, "last": 1.0}
    assert found["judge"] == {"calls": 160}
    assert json.dumps(found, allow_nan=False)


def test_guard_needs_no_torch():
    code = "import sys, r1vfree_cli.training.guard; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_sampler_that_drifts_is_told_at_once_and_once():
    guard = CollapseGuard(Guard())

    def step(n, difference):
        return guard.observe(figures(n, [], loss=0.1, grad_norm=1.0, sampler_difference=difference))

    assert step(1, 0.02).warnings == [] and step(2, None).warnings == []
    (warning,) = step(3, 0.73).warnings
    assert "0.73 on average at step 3" in warning
    assert step(4, 0.73).warnings == [] and step(4, 0.73).stop is None
