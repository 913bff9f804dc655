"""Run dirs: nothing is overwritten, nothing is half-written."""

import os
import sys

import pytest

from r1vfree_cli.core import files
from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.run.run_dir import RunDir


def test_a_run_dir_that_holds_a_run_names_every_way_out(tmp_path):
    run = RunDir(tmp_path / "run")
    run.begin("a: 1\n")
    with pytest.raises(UsageError) as e:
        run.begin("a: 1\n")
    assert all(way in e.value.hint for way in ("--resume", "--run-dir", "--overwrite"))
    assert run.recipe.read_text() == "a: 1\n"


def test_attempts_count_and_keep_their_logs(tmp_path):
    run = RunDir(tmp_path / "run")
    run.begin("a: 1\n")
    (run.logs / "rank-0.log").write_text("first")
    run.begin("a: 1\n", resume=True)
    assert run.attempt == 2 and run.logs.name == "attempt-2" and (run.path / "logs/attempt-1/rank-0.log").exists()


def test_overwrite_starts_anew(tmp_path):
    run = RunDir(tmp_path / "run")
    run.begin("a: 1\n")
    (run.path / "metrics.jsonl").write_text("{}\n")
    run.begin("b: 1\n", overwrite=True)
    assert run.attempt == 1 and not run.metrics.exists()


def begin_killed(path, n: int, overwrite: bool) -> bool:
    """`begin` in a process that ends, without cleaning up, at its n-th use of the file system; False: it had fewer."""
    pid = os.fork()
    if pid == 0:
        left = n

        def hook(event, args):
            nonlocal left
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.addaudithook(hook)
        RunDir(path).begin("a: 1\n", overwrite=overwrite)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("overwrite", [False, True])
def test_begin_killed_at_any_moment_can_be_done_again(tmp_path, overwrite):
    for n in range(1, 200):
        run = RunDir(tmp_path / str(n))
        if overwrite:
            run.begin("old: 1\n")
            for name in ("checkpoints/checkpoint-2/model.safetensors", *(f"{i}.jsonl" for i in range(8))):
                files.write_text(run.path / name, "old")
            run.status_file.unlink()  # so that the recipe alone says what the folder is
        if not begin_killed(run.path, n, overwrite):
            break
        run.begin("a: 1\n", resume=run.holds_run and not overwrite, overwrite=overwrite)
        assert run.recipe.read_text() == "a: 1\n" and run.attempt >= 1 and run.logs.is_dir()
        assert not list(run.path.glob(".*")) and not (overwrite and run.checkpoints.exists())
    assert 6 < n < 199


@pytest.mark.parametrize("held", [False, True])
def test_a_faster_node_may_have_been_in_the_folder_first(tmp_path, held):
    """All nodes start the same command at the same moment."""
    run = RunDir(tmp_path / "run")
    if held:
        run.begin("a: 1")
    theirs = run.path / "nodes" / "1" / "recipe.yaml"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("of node 1")
    run.begin("a: 2", overwrite=held)
    assert run.recipe.read_text() == "a: 2" and run.attempt == 1 and theirs.read_text() == "of node 1"


def test_overwrite_never_deletes_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "photo.png").write_text("precious")
    with pytest.raises(UsageError, match="no run dir"):
        RunDir(tmp_path).begin("a: 1\n", overwrite=True)
    assert (tmp_path / "photo.png").exists()


def test_a_file_is_no_run_dir_and_nothing_to_resume(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        RunDir(tmp_path / "f").begin("")
    with pytest.raises(UsageError, match="no run to resume"):
        RunDir(tmp_path / "none").begin("", resume=True)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    files.write_json(path, {"a": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot write .*status\.json: No space left on device"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["status.json"]
    path.write_text('{"a": 1}', encoding="utf-8-sig")  # as Windows editors save it
    assert files.read_json(path) == {"a": 1}


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x", {"a": float("nan")})


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1, 2", b"[]", b'["x"]', b"7", b"[-1]", b"[" * 50_000, b"\xff"])
def test_a_cache_that_is_damaged_is_made_again(content, tmp_path, capsys):
    path = tmp_path / "cache.json"
    if content is not None:
        path.write_bytes(content)
    assert files.remembered(path, lambda found: found[0] > 0, lambda: [3]) == [3] == files.read_json(path)
    assert ("is damaged: made again" in capsys.readouterr().err) == (content is not None)
    assert files.remembered(path, lambda found: found[0] > 0, lambda: [4]) == [3]


def test_a_killed_writers_last_line_is_left_out_but_a_broken_line_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert [d for _, d in files.read_jsonl(path)] == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        list(files.read_jsonl(path))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"attempt": 1}', '{"state": "x"}', '{"state": "failed", "step": "3"}', '{"state": "failed", "attempt": -1}']
)  # fmt: skip
def test_a_damaged_status_is_named_and_says_the_way_out(tmp_path, content):
    run = RunDir(tmp_path)
    run.begin("a: 1\n")
    run.status_file.write_text(content)
    with pytest.raises(DataError, match=r"status\.json") as e:
        run.begin("a: 1\n", resume=True)
    assert "--resume" in e.value.hint
    run.status_file.unlink()
    run.begin("a: 1\n", resume=True)
    assert run.attempt == 1
