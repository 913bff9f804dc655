"""A run from the launcher's side: its lock, its end however it comes, and what a resume may change."""

import os
import subprocess
import sys

import pytest

from r1vfree_cli.config import recipes
from r1vfree_cli.core import files, machine
from r1vfree_cli.core.errors import GuardStop, Interrupted, UsageError
from r1vfree_cli.launch import job as jobs
from r1vfree_cli.run import contract, run_dir
from r1vfree_cli.run.run_dir import RunDir

TINY = recipes.load("grpo", "tiny")


def ends(monkeypatch, error: BaseException | None = None) -> None:
    """Launching leaves a summary, or raises."""

    def launched(stage, recipe, where, *_):
        if error is not None:
            raise error
        files.write_json(where.summary, {"seconds": {stage: 1.5}})

    monkeypatch.setattr(jobs, "_launch", launched)


def test_two_names_of_a_run_dir_are_one_run(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / "link"
    link.symlink_to("../run")
    ends(monkeypatch)
    with (
        files.lock(tmp_path / "run", "run dir"),
        pytest.raises(UsageError, match=r"another r1v process \(pid \d+\) is using the run dir"),
    ):
        jobs.run("grpo", TINY, RunDir(link))
    monkeypatch.chdir(tmp_path / "run")
    assert jobs.run("grpo", TINY, RunDir("."))["seconds"] == {"grpo": 1.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "run"]  # no lock is left


def test_one_lock_has_one_holder_although_holders_delete_its_file(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom r1vfree_cli.core.files import lock\n"
        "for _ in range(60):\n"
        "    with lock(Path(sys.argv[1]), 'folder', wait=True):\n"
        "        os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))\n"
        "        os.unlink(sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "held")]
    assert [p.wait(60) for p in [subprocess.Popen(command) for _ in range(4)]] == [0] * 4


def test_a_killed_holder_lets_go(tmp_path):
    code = "import os, sys; from pathlib import Path; from r1vfree_cli.core.files import lock\nwith lock(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")]).returncode == -9
    with files.lock(tmp_path / "run", "run dir"):
        pass


def test_a_folder_that_cannot_be_written_is_told():
    with (
        pytest.raises(UsageError, match=r"cannot write /proc/\.run\.lock"),
        files.lock(run_dir.Path("/proc/run"), "run dir"),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (Interrupted("interrupted at step 3"), "interrupted", "interrupted at step 3"),
        (GuardStop("collapsed"), "stopped", "collapsed"),
        (UsageError("no judge"), "failed", "no judge"),
        (ValueError("a bug"), "failed", "ValueError('a bug')"),
    ],
)
def test_the_status_says_how_a_run_ended(tmp_path, monkeypatch, error, state, reason):
    run = RunDir(tmp_path / "run")
    ends(monkeypatch, error)
    with pytest.raises(Interrupted if isinstance(error, KeyboardInterrupt) else type(error)):
        jobs.run("grpo", TINY, run)
    assert (run.status["state"], run.status["reason"]) == (state, reason)


def test_an_interruption_says_what_is_kept_and_the_command_that_goes_on(tmp_path, monkeypatch):
    command = ["r1v", "grpo", "--recipe", "my recipe.yaml", "--overwrite", "--set", "train.max_steps=9"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(jobs, "lacking", lambda path, verify: [])
    run = RunDir(tmp_path / "run")
    found = jobs._interrupted(run, 0)
    assert found.message == "interrupted before the first checkpoint"
    assert found.hint == "to go on: r1v grpo --recipe 'my recipe.yaml' --set train.max_steps=9 --resume"
    (run.checkpoints / "checkpoint-188").mkdir(parents=True)
    os.utime(run.checkpoints / "checkpoint-188", (1, 1))  # a clock that was set back
    assert jobs._interrupted(run, 94).message == "interrupted: checkpoint at step 188 saved"
    assert jobs._interrupted(run, 188).message == "interrupted after checkpoint 188"


def test_a_disk_too_full_for_the_status_does_not_hide_why_the_run_ended(tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path / "run")
    ends(monkeypatch, machine.disk_full("checkpoint-4"))

    def full(self, state, **_):
        if state == run_dir.FAILED:
            raise UsageError("cannot write status.json: No space left on device")
        files.write_json(self.status_file, {"state": state, "attempt": 1})

    monkeypatch.setattr(RunDir, "set_status", full)
    with pytest.raises(UsageError, match="checkpoint-4"):
        jobs.run("grpo", TINY, run)
    assert "cannot write status.json" in capsys.readouterr().err


def test_a_resume_tells_what_its_recipe_changes_and_keeps_the_kind_of_run(tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path / "run")
    ends(monkeypatch)
    jobs.run("grpo", TINY, run)
    jobs.run("grpo", TINY, run, resume=True)
    assert "another recipe" not in capsys.readouterr().err
    longer = recipes.load("grpo", "tiny", ["train.max_steps=100", "data.path=elsewhere"])
    jobs.run("grpo", longer, run, resume=True)
    said = capsys.readouterr().err
    assert "the resumed run has another recipe: data.path: 'shapes" in said and "-> 'elsewhere'" in said
    assert "train.max_steps: " in said and "-> 100" in said
    before = run.recipe.read_bytes()
    with pytest.raises(UsageError, match="holds a run of r1v grpo, which r1v sft cannot resume"):
        jobs.run("sft", recipes.load("sft", "tiny"), run, resume=True)
    assert run.recipe.read_bytes() == before and run.attempt == 3


def test_the_commit_is_that_of_the_recipes_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "recipes"
    repository.mkdir()
    assert contract.git_commit(repository) is None
    git = ["git", "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    recipe = repository / "mine.yaml"
    recipe.write_text(recipes.to_yaml(recipes.load("grpo", "tiny")))
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    seen = []
    monkeypatch.setattr(jobs, "run", lambda *_, commit, **__: seen.append(commit) or {})
    jobs.train("grpo", str(recipe), [])
    recipe.write_text(recipe.read_text() + "# changed\n")
    jobs.train("grpo", str(recipe), [])
    assert seen == [head, f"{head}-dirty"]


def test_a_resume_tells_that_data_or_versions_have_changed(tmp_path, capsys, monkeypatch):
    now = contract.build("grpo", TINY, data_sha256="1", git_commit="abc")
    contract.write(tmp_path, now)
    contract.warn_of_changes(tmp_path, now)
    assert capsys.readouterr().err == ""
    contract.warn_of_changes(
        tmp_path, contract.build("grpo", TINY, data_sha256="2", git_commit="abc") | {"versions": {"trl": "9"}}
    )
    said = capsys.readouterr().err
    assert "data has changed" in said and '"sha256": "1"' in said and "versions has changed" in said
    assert "git_commit" not in said and now["git_commit"] == "abc"


def test_that_remote_code_will_run_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "run", lambda *_, **__: {})
    for sets, said in ([], False), (["model.trust_remote_code=true"], True):
        jobs.train("grpo", "tiny", sets, path=tmp_path / "run")
        assert ("the checkpoint's own code will run" in capsys.readouterr().err) == said
