"""A key that the judge gets stands in no file, log or report of the run; one in a recipe is refused and not shown."""

import json
import os
import subprocess
import sys

import judge_servers as js
import pytest
import yaml
from tiny_models import draw_rows, save_tiny, write_rows

from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.judges.client import Endpoint
from r1vfree_cli.judges.protocol import Failure

KEY = "sk-planted0123456789abcdefghij"


def r1v(*args, cwd, **env):
    return subprocess.run(
        [sys.executable, "-c", "from r1vfree_cli.cli import main; main()", *args],
        cwd=cwd,
        env=os.environ | {"R1V_CACHE": str(cwd / "cache"), "TMPDIR": str(cwd / "tmp")} | env,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture
def recipe(tmp_path):
    save_tiny(tmp_path / "model")
    write_rows(tmp_path / "data", draw_rows(12))
    (tmp_path / "tmp").mkdir()
    train = {
        "num_generations": 4,
        "prompts_per_device": 2,
        "max_steps": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-4,
    }
    return {
        "model": {"name": "model", "dtype": "float32", "min_pixels": 784, "max_pixels": 84 * 84},
        "data": {"path": "data"},
        "rewards": [{"name": "format"}, {"name": "feedback", "backend": "chat", "model": "m", "canaries": None, "api_key_env": "MY_JUDGE_KEY",
                     "max_retries": 0}],
        "train": train | {"gradient_checkpointing": False, "save_steps": 1, "beta": 0.0},
        "launch": {"preset": "cpu"},
    }  # fmt: skip


def test_a_planted_key_is_in_no_byte_of_a_run(recipe, tmp_path):
    """A whole run and its report; and one whose judge, or the gateway before it, shows the request that it got."""

    def echo(handler, body):
        js.send(handler, 200, f"you sent {handler.headers['Authorization']}".encode(), "text/html")

    said, asked = b"", []
    for name, behave, code in (("run", js.good, 0), ("refused", echo, 2)):
        with js.JudgeServer(behave) as server:
            recipe["rewards"][1]["base_url"] = server.url
            (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
            done = r1v("grpo", "--recipe", "r.yaml", "--run-dir", name, cwd=tmp_path, MY_JUDGE_KEY=KEY)
            asked.append([KEY in r["_headers"]["authorization"] for r in server.requests])
        assert done.returncode == code, done.stderr.decode()[-3000:]
        said += done.stdout + done.stderr
    assert b"you sent Bearer ***" in said and all(a and all(a) for a in asked)
    done = r1v("report", "run", "--out", "report", cwd=tmp_path, MY_JUDGE_KEY=KEY)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"launch.json", "report.html", "rank-0.log", "optimizer.pt"} <= {p.name for p in files}
    assert [str(p) for p in files if KEY.encode() in p.read_bytes()] == []
    assert KEY.encode() not in said + done.stdout + done.stderr


@pytest.mark.parametrize(
    "place",
    [
        f"rewards.feedback.api_key_env={KEY}",
        f"rewards.feedback.api_key={KEY}",
        f"rewards.feedback.request={{headers: {{Authorization: 'Bearer {KEY}'}}}}",
        f"rewards.feedback.base_url=http://me:{KEY}@127.0.0.1:9/v1",
        f"train.hub_token={KEY}",
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(place, recipe, tmp_path):
    recipe["rewards"][1]["base_url"] = "http://127.0.0.1:9"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = r1v("grpo", "--recipe", "r.yaml", "--run-dir", "run", "--set", place, cwd=tmp_path)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 2 and "looks like a key" in said and KEY not in said, said
    assert place.partition("=")[0].split(".")[-1] in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("padding", [0, 240])
@pytest.mark.parametrize("code", [401, 404, 400])
def test_a_key_that_the_evaluations_endpoint_echoes_is_not_told(code, padding, monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    said = {"error": {"message": f"{'x' * padding} you sent Bearer {KEY}"}}
    echo = js.status(code, json.dumps(said).encode())
    told = []
    with js.JudgeServer(echo) as server:
        endpoint = Endpoint(server.url, "m", max_retries=0, api_key_env="MY_JUDGE_KEY")

        async def ask(_):
            try:
                await endpoint.chat([{"role": "user", "content": [{"type": "text", "text": "?"}]}], 8, 0)
            except (UsageError, Failure) as e:
                told.append(f"{e} {getattr(e, 'details', '')}")

        endpoint.run([0], ask, lambda *_: None)
        assert KEY in server.requests[0]["_headers"]["authorization"]
    assert len(told) == 1 and "sk-" not in told[0] and (padding or "Bearer ***" in told[0])
