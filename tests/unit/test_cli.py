"""The command line: streams, exit codes, and what it may import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1vfree_cli.config import recipes
from r1vfree_cli.launch import plan as plans

HEAVY = ("torch", "transformers", "trl", "datasets", "deepspeed", "accelerate")


def r1v(*args, **env):
    return subprocess.run(
        [sys.executable, "-c", "from r1vfree_cli.cli import main; main()", *args],
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=120,
    )


def imported(code):
    probe = f"import sys; {code}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "module",
    ["cli", "core.errors", "core.console", "core.prompts", "core.files", "core.process", "config.schema", "config.recipes",
     "config.trl_keys", "config.embedded", "run.run_dir", "run.contract", "run.checkpoint", "launch.plan", "launch.processes",
     "launch.preflight", "launch.job", "launch.watch", "data.rows", "eval.hallusion.score", "eval.stats"],
)  # fmt: skip
def test_import_law_no_torch(module):
    assert imported(f"import r1vfree_cli.{module}") == []


def test_import_law_cli_imports_only_typer_and_errors():
    code = "import sys; import r1vfree_cli.cli; print(*[m for m in sys.modules if m.startswith('r1vfree_cli.')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    others = {name for name in found if not name.startswith("r1vfree_cli.cli")}
    assert others == {"r1vfree_cli.core", "r1vfree_cli.core.errors"}


def test_dry_run_on_a_laptop_imports_no_torch_and_prints_the_command():
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPROFILEIMPORTTIME": "1"}
    done = r1v("grpo", "--recipe", "qwen25vl-3b-rlhfv", "--dry-run", "--json", **env)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert "--num_processes 6" in plan["command"] and "judges.server" in plan["server"]["command"]
    assert "--port 8000" in plan["server"]["command"] and not any(name.startswith("R1V_") for name in plan["env"])
    assert any("8 GPUs" in line for line in plan["unchecked"])
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "pydantic" in modules and not modules & set(HEAVY)


def test_a_users_mistake_is_exit_2_without_a_traceback_and_leaves_stdout_alone():
    done = r1v("grpo", "--recipe", "qwen25vl-3b-rlhfv", "--set", "train.bta=1", "--json")
    assert done.returncode == 2 and done.stdout == ""
    assert "train.beta" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_traceback_at_any_place():
    assert "Traceback" in r1v("grpo", "--recipe", "nope", "--debug").stderr
    assert "Traceback" in r1v("--debug", "grpo", "--recipe", "nope").stderr


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_what_libraries_tell_their_callers_is_shown_with_debug_only(debug):
    code = f"""import sys, warnings
from r1vfree_cli import cli
cli.app = lambda: warnings.warn("use another name", FutureWarning)
sys.argv = ["r1v", *{debug}]
cli.main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and ("use another name" in done.stderr) == bool(debug)


@pytest.mark.parametrize("args", [("nope",), ("grpo",), ("grpo", "--recipe"), ("recipes", "show", "nope"), ("report",)])
def test_wrong_usage_is_exit_2(args):
    assert r1v(*args).returncode == 2


def test_resume_and_overwrite_exclude_each_other():
    assert r1v("grpo", "--recipe", "qwen2vl-2b-clevr", "--resume", "--overwrite").returncode == 2


def test_lists_of_commands_and_recipes_hold_whole_sentences():
    assert "..." not in r1v("--help", COLUMNS="80").stdout.partition("Commands:")[2]
    for line in json.loads(r1v("recipes", "list", "--json").stdout):
        assert line["purpose"].endswith("."), line


def test_json_is_one_document():
    assert len(json.loads(r1v("recipes", "list", "--json").stdout)) >= 6
    shown = json.loads(r1v("recipes", "show", "grpo/qwen2vl-2b-clevr", "--set", "train.beta=1e-3", "--json").stdout)
    assert shown["train"]["beta"] == 1e-3


def test_no_color_is_honoured():
    assert "\x1b[" not in r1v("grpo", "--recipe", "nope", NO_COLOR="1", FORCE_COLOR="").stderr


def test_missing_gpus_are_an_error_of_a_run_and_a_note_of_a_dry_run(tmp_path):
    args = ("grpo", "--recipe", "qwen2vl-2b-clevr", "--run-dir", str(tmp_path / "run"))
    done = r1v(*args, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "needs 8 GPUs" in done.stderr and not (tmp_path / "run").exists()
    done = r1v(*args, "--dry-run", "--set", "launch.processes=1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and "with 1 process needs 1 GPU on" in done.stderr


def test_a_model_path_that_does_not_exist_is_known_before_anything_loads(tmp_path):
    sets = ["--set", "launch.device=cpu", "--set", f"model.name={tmp_path}/nope"]
    done = r1v("grpo", "--recipe", "qwen2vl-2b-clevr", *sets, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2 and "model.name" in done.stderr and not (tmp_path / "run").exists()


def test_offload_says_before_it_starts_that_it_needs_a_compiler(tmp_path):
    args = ("grpo", "--recipe", "tiny", "--set", "launch={preset: zero3-offload, device: cpu}")
    done = r1v(*args, "--run-dir", str(tmp_path / "run"), CXX="no-compiler")
    assert done.returncode == 2 and "C++ compiler, found no no-compiler" in done.stderr
    assert not (tmp_path / "run").exists()
    dry = r1v(*args, "--dry-run", "--json", CXX="no-compiler")  # this machine has what the run needs but for that
    assert dry.returncode == 2 and not dry.stdout and "C++ compiler" in dry.stderr
    plan = plans.plan("grpo", recipes.load("grpo", "tiny", ["launch={preset: zero3-offload, device: cpu}"]), tmp_path)
    assert plan.env["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)  # ninja is there


def test_modules_of_the_working_directory_are_not_imported(tmp_path):
    """Folders like vllm/ or wandb/ lie where people run things; `python -m` would take them for packages."""
    for name in ("json", "yaml", "typer", "pydantic", "wandb", "vllm", "torch", "trl", "uvicorn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('imported {name}')")
    for args, code in ((["recipes", "list"], 0), (["serve-reward", "--model", "/no/such"], 3)):
        argv = [sys.executable, "-m", "r1vfree_cli", *args]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == code and "imported" not in done.stderr, done.stderr
    recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv")
    for plan in (plans.plan("grpo", recipe, tmp_path), plans.server_plan(recipe, 1), plans.module_plan("x")):
        assert plan.env["PYTHONSAFEPATH"] == "1"


def test_a_piped_table_is_as_wide_as_its_cells(capsys, monkeypatch):
    from r1vfree_cli.core import console

    monkeypatch.setenv("COLUMNS", "40")
    names = [f"VD_illusion_{i}" for i in range(12)]
    console.emit_table("title", ["", *names], [["right / total", *names]])
    lines = capsys.readouterr().out.splitlines()
    assert sum(all(name in line for name in names) for line in lines) == 2


def test_the_final_table_says_what_was_dropped_what_was_judged_and_what_took_the_time():
    from r1vfree_cli.launch import watch

    summary = {
        "heldout_accuracy": {"greedy": {"before": 0.4, "after": 0.7}},
        "reward": {"first": 0.5, "last": 0.75},
        "format_rate": {"first": 1.0, "last": None},
        "loss": {"first": 1e-9, "last": 0.0},
        "dropped": {"prompt too long": 3},
        "judge": {"calls": 1200, "cache_hits": 0, "cost": 0.75, "floored": 2, "failed/rate_limited": 4},
        "seconds": {"train the judge": 60.2, "grpo": 30.0, "load": 4.0, "train": 20.0},
    }
    assert watch.summary_rows(summary) == [
        ["held-out accuracy, greedy", "0.400", "0.700"],
        ["reward", "0.500", "0.750"],
        ["format rate", "1.000", ""],
        ["rows dropped, prompt too long", "", "3"],
        ["judge calls", "", "1,200"],
        ["judge cost", "", "0.75"],
        ["judge calls failed, rate limited", "", "4"],
        ["time, train the judge", "", "60 s"],
        ["time, grpo", "", "30 s"],
        ["  of it, load", "", "4 s"],
        ["  of it, train", "", "20 s"],
    ]
    assert watch.summary_rows({"loss": {"first": 5.5, "last": 0.1}}) == [["loss", "5.500", "0.100"]]


def test_the_last_lines_say_where_the_model_lies_and_what_to_run_next():
    from r1vfree_cli.launch import watch

    assert watch.last_lines("grpo", "runs/my run", False).splitlines() == [
        "  model  runs/my run/final",
        "  look   r1v view 'runs/my run'; r1v report 'runs/my run'",
        "  next   r1v eval hallusion 'runs/my run'",
    ]
    best = watch.last_lines("grpo", "runs/a", False, {"step": 150, "aAcc": 41.23}).splitlines()[1]
    assert best == "  best   runs/a/checkpoints/checkpoint-150 (aAcc 41.2)"
    assert "r1v merge runs/a --out runs/a/merged, then r1v eval hallusion runs/a/merged" in watch.last_lines(
        "grpo", "runs/a", True
    )
    assert "r1v grpo --recipe NAME --set model.name=runs/a/final" in watch.last_lines("sft", "runs/a", False)


def test_the_progress_line_shows_what_is_learnt_and_how_long_it_takes(tmp_path, monkeypatch, capsys):
    from r1vfree_cli.core import console
    from r1vfree_cli.launch import watch
    from r1vfree_cli.run.run_dir import RunDir

    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    run = RunDir(tmp_path)
    run.set_status("running", step=40, max_steps=100)
    figures = {"reward": 0.5124, "reward_std": 0.211, "rewards/format/mean": 0.98, "completions/mean_length": 23.4}
    figures |= {"kl": 0.01234, "judge/latency_p95": 0.451, "loss": 1e-9}
    with watch.RunView("grpo", run) as view:
        for step in (41, 42, 43):  # resumed: 40 steps are not of this attempt's pace
            with open(run.metrics, "a") as f:
                f.write(json.dumps({"step": step} | figures) + "\n")
            now += 60
            view.update()
    note = "reward 0.512 spread 0.21 format 0.98 length 23 kl 0.012 judge 0.45 s"
    assert capsys.readouterr().err.splitlines()[-1] == f"grpo: 43/100 3:00<57:00 {note}"


def test_a_file_that_is_edited_while_a_run_is_watched_does_not_end_the_run(tmp_path):
    from r1vfree_cli.launch import watch
    from r1vfree_cli.run.run_dir import RunDir

    run = RunDir(tmp_path)
    run.set_status("running", step=0, max_steps=9)
    with watch.RunView("grpo", run) as view:
        run.metrics.write_bytes(b'ss": 1}\n\0\0\n[]\n7\n' + b"[" * 50_000 + b'\n{"step": 3, "loss": 1.0}\n')
        assert view._new(run.metrics) == [{"step": 3, "loss": 1.0}]
        with open(run.metrics, "a") as file:
            file.write('{"step": [], "loss": 1}\n{"step": NaN, "loss": 1}\n{"loss": 1}\n')
            file.write(f'{{"step": {10**400}, "loss": 1}}\n{{"step": 4, "loss": 1, "reward": {10**400}}}\n')
        view.update()


def test_a_line_beside_a_progress_bar_has_a_line_of_its_own(monkeypatch):
    import io

    from r1vfree_cli.core import console

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with console.progress("grpo", 9) as bar:
        bar.advance(1, "reward 1")
        console.log("a sample")
    before, _, after = sys.stderr.getvalue().partition("a sample")
    assert before.endswith("\x1b[2K")  # the bar's line was erased first
    assert after.startswith("\n") and "grpo" in after  # and drawn again below
    console.log("later")
    assert sys.stderr.getvalue().endswith("later\n")


def test_merge_prints_what_it_checked_and_no_list_of_files(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from r1vfree_cli import cli
    from r1vfree_cli.launch import processes as launch

    summary = {"out": "o", "kind": "shards", "source": "c", "base": None, "dtype": "float32", "files": ["config.json"]}
    summary |= {"max_logit_difference": 1.234e-5, "tolerance": 0.5, "contract": True}
    monkeypatch.setattr(launch, "run_json", lambda plan: summary)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "latest").write_text("global_step1")
    text = CliRunner().invoke(cli.app, ["merge", str(tmp_path), "--out", "o"]).stdout
    assert "1.2e-05 (allowed 0.5)" in text and "shards" in text and "config.json" not in text and "None" not in text


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("grpo", "tiny"), "--recipe tiny"),
        (("sft", "--config", "x.yaml"), "--recipe NAME"),
        (("grpo", "--recipe", "tiny", "train.max_steps=1"), "--set train.max_steps=VALUE"),
        (("grpo", "--recipe", "tiny", "--learning-rate", "1e-5"), "--set train.learning_rate=VALUE"),
    ],
)
def test_habits_from_other_trainers_get_a_hint(args, hint):
    done = r1v(*args)
    assert done.returncode == 2 and hint in done.stderr and done.stdout == "" and "Traceback" not in done.stderr


def test_python_m_and_shell_completion():
    done = subprocess.run([sys.executable, "-m", "r1vfree_cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("r1v ")
    assert "--install-completion" in r1v("--help").stdout


@pytest.mark.parametrize(
    ("typed", "found"),
    [("grpo --recipe qwen25vl-7b", {"qwen25vl-7b-qlora-24gb", "qwen25vl-7b-rlhfv"}), ("sft -r tiny-vqa-j", {"tiny-vqa-judge"}),
     ("doctor --recipe grpo/own", {"grpo/own-data"}), ("grpo --recipe mi", {"mine.yaml"}), ("eval hallusion --recipe po", {"pope"})],
)  # fmt: skip
def test_a_shell_completes_recipes(typed, found, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").touch()
    words = ["r1v", *typed.split()]
    asked = {"_R1V_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [Path(sys.executable).parent / "r1v"], env=os.environ | asked, capture_output=True, text=True, cwd=tmp_path
    )
    assert found <= set(done.stdout.split()) and all(name.startswith(words[-1]) for name in done.stdout.split()), (
        done.stderr
    )


def test_recipes_fit_80_columns_and_say_what_they_need():
    done = r1v("recipes", "list")
    assert "GPUs" in done.stdout.splitlines()[0] and max(map(len, done.stdout.splitlines())) <= 80
    needs = {row["recipe"]: row["gpus"] for row in json.loads(r1v("recipes", "list", "--json").stdout)}
    assert needs["grpo/qwen25vl-3b-rlhfv"] == 8 and needs["grpo/tiny"] is None
    assert "1 x 24 GB" in next(line for line in done.stdout.splitlines() if "qwen25vl-7b-qlora-24gb" in line)


@pytest.mark.parametrize("said, gigabytes", [("81559\n24564\n", 24), ("[N/A]\n", None), ("", None), (None, None)])
def test_memory_of_the_smallest_gpu(said, gigabytes, monkeypatch, tmp_path):
    from r1vfree_cli.core.process import gpu_gigabytes

    if said is not None:
        (tmp_path / "nvidia-smi").write_text(
            f"#!/bin/sh\nprintf '{said}'\n".replace("\n2", "\\n2").replace("\n'", "\\n'")
        )
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if said is not None else str(tmp_path))
    assert gpu_gigabytes() == gigabytes


def test_a_recipe_is_copied_with_its_comments_and_never_over_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    assert r1v("recipes", "copy", "grpo/tiny", str(file)).returncode == 0
    assert file.read_text().startswith("# ") and r1v("recipes", "validate", str(file)).returncode == 0
    file.write_text("mine")
    done = r1v("recipes", "copy", "grpo/tiny", str(file))
    assert done.returncode == 2 and file.read_text() == "mine"


def test_merge_checks_its_path_before_anything_is_started(monkeypatch, tmp_path):
    from r1vfree_cli.core.errors import DataError
    from r1vfree_cli.launch import job
    from r1vfree_cli.launch import processes as launch

    monkeypatch.setattr(launch, "run_json", lambda plan: pytest.fail("it was started"))
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/gone"}')
    options = {"base": None, "dtype": None, "overwrite": False}
    with pytest.raises(DataError, match="no model folder /gone") as e:
        job.merge(tmp_path, tmp_path / "out", **options)
    assert e.value.hint.startswith("give its place with --base")
    with pytest.raises(DataError, match="no checkpoint at"):
        job.merge(tmp_path / "none", tmp_path / "out", **options)
