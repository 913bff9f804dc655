"""The main job as the README starts it: the tiny recipe learns, what it made is cached, and the other commands use it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PHOTOS = ["astronaut.png", "camera.png", "horse.png", "rocket.jpg", "motorcycle_left.png", "page.png"]


def r1v(*args: str, cwd: Path, cache: Path, timeout: int = 1500) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from r1vfree_cli.cli import main; main()", *args],
        cwd=cwd,
        env=os.environ | {"R1V_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a finished tiny run in `runs/tiny`, and the cache that it filled."""
    folder = tmp_path_factory.mktemp("tiny")
    done = r1v("grpo", "--recipe", "tiny", cwd=folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_the_tiny_recipe_learns_without_labels(place):
    accuracy = json.loads((place / "runs/tiny/summary.json").read_text())["heldout_accuracy"]
    for how in ("greedy", "sampled"):
        assert accuracy[how]["after"] >= accuracy[how]["before"] + 0.10, accuracy
    table = (place / "stdout.txt").read_text()
    for part in ("held-out accuracy, greedy", "reward", "format rate", "time, train the judge"):
        assert part in table, part


def test_the_run_dir_is_whole(place):
    run = place / "runs/tiny"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished" and status["step"] == steps[-1]
    assert len(list((run / "rollouts").glob("*.parquet"))) == len(steps)
    contract = json.loads((run / "final/r1v.json").read_text())
    assert contract["max_pixels"] == 3136 and contract["data"]["sha256"]


def test_a_second_run_starts_grpo_at_once_and_a_held_run_dir_is_not_overwritten(place):
    short = ("--set", "train.max_steps=2", "--set", "data.heldout=null", "--json")
    done = r1v("grpo", "--recipe", "tiny", *short, "--run-dir", "again", cwd=place, cache=place / "cache")
    assert done.returncode == 0, done.stderr
    seconds = json.loads(done.stdout)["seconds"]
    assert "train the judge" not in seconds and "warm-start the policy (SFT)" not in seconds
    held = r1v("grpo", "--recipe", "tiny", *short, "--run-dir", "again", cwd=place, cache=place / "cache")
    assert held.returncode == 2 and "--overwrite" in held.stderr and "--run-dir" in held.stderr


def test_two_ranks_share_one_reward_server_and_take_the_first_step_of_one(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = f"{{name: feedback, backend: classify, cache: false, serve: {{model: embedded:tiny-judge, port: {port}}}}}"
    done = r1v(
        "grpo", "--recipe", "tiny", "--set", f"rewards=[{{name: format, weight: 0.2}}, {served}]",
        "--set", "launch={preset: ddp, device: cpu, processes: 2}", "--set", "train.prompts_per_device=4",
        "--set", "train.max_steps=2", "--set", "data.heldout=null", "--run-dir", "served",
        cwd=place, cache=place / "cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = ("runs/tiny", "served")
    alone, shared = (json.loads((place / run / "metrics.jsonl").read_text().split("\n")[0]) for run in runs)
    for key in ("reward", "rewards/feedback/mean", "grad_norm", "completions/mean_length"):
        assert shared[key] == pytest.approx(alone[key], rel=1e-4), key
    assert shared["judge/calls"] > 0 and not any(shared[key] for key in shared if key.startswith("judge/failed"))
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)), "the reward server outlived its run"


def test_photographs_become_rows_and_train(place):
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    if not all((folder / name).is_file() for name in PHOTOS):
        pytest.skip("this scikit-image carries other photographs")
    rows = [
        {"id": str(i), "image": name, "problem": "What does the picture show?"} for i, name in enumerate(PHOTOS * 2)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = r1v(
        "prepare-data", "jsonl", "--input", "rows.jsonl", "--images", str(folder), "--out", "photos", "--json",
        cwd=place, cache=place / "cache",
    )  # fmt: skip
    assert made.returncode == 0 and json.loads(made.stdout)["splits"]["train"]["rows"] == len(rows), made.stderr
    done = r1v(
        "grpo", "--recipe", "tiny", "--set", "data.path=photos", "--set", "train.max_steps=1",
        "--set", "data.heldout=null", "--set", "rewards=[{name: format}]", "--run-dir", "photo-run", cwd=place, cache=place / "cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_report_shows_the_run(place):
    done = r1v("report", "runs/tiny", "--out", "report", cwd=place, cache=place / "cache")
    assert done.returncode == 0, done.stderr
    page = (place / "report/report.html").read_text()
    assert "held-out" in page.lower() and "data:image" in page


def test_doctor_finds_the_recipe_ready(place):
    done = r1v("doctor", "--recipe", "tiny", "--json", cwd=place, cache=place / "cache")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, [c for c in checks.values() if c["state"] == "error"]
    assert checks["canaries"]["state"] == "ok" and "480 rows" in checks["prompt tokens"]["found"]
