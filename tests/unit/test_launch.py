"""Plans are pure; execute passes on signals, errors and exit codes of real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from r1vfree_cli.config import recipes
from r1vfree_cli.core.errors import DataError, Interrupted, R1VError, UsageError
from r1vfree_cli.launch import plan as plans
from r1vfree_cli.launch import processes as launch


def value(plan, flag):
    return plan.argv[plan.argv.index(flag) + 1]


def test_the_6_plus_2_recipe_trains_on_the_gpus_that_the_judge_does_not_use(tmp_path):
    recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv")
    plan = plans.plan("grpo", recipe, tmp_path)
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5"
    assert value(plan, "--num_processes") == "6" and value(plan, "--config_file").endswith("zero3.yaml")
    assert plan.argv[-3:] == ["-m", "r1vfree_cli.training.grpo", str(tmp_path)]
    server = plans.server_plan(recipe, 8123)
    assert server.env["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert server.argv[server.argv.index("--host") + 1] == "127.0.0.1"


def test_trap_the_judge_is_not_placed_by_arithmetic_on_ranks(tmp_path):
    sets = ["rewards.feedback.serve.devices=[0, 3]", "launch.processes=4"]
    plan = plans.plan("grpo", recipes.load("grpo", "qwen25vl-3b-rlhfv", sets), tmp_path)
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "1,2,4,5"


def test_nodes_rank_and_address_go_through(tmp_path):
    sets = ["launch.nodes=2", "launch.processes=16", "launch.node_rank=1", "launch.main_address=10.0.0.5"]
    plan = plans.plan("grpo", recipes.load("grpo", "qwen2vl-2b-clevr", sets), tmp_path)
    assert value(plan, "--num_machines") == "2" and value(plan, "--machine_rank") == "1"
    assert value(plan, "--main_process_ip") == "10.0.0.5" and value(plan, "--main_process_port") == "29500"
    assert plan.processes == 8


@pytest.mark.parametrize("preset", ["cpu", "ddp", "zero1", "zero2", "zero3", "zero3-offload"])
def test_every_preset_has_its_file_and_runs_on_cpu_when_asked(preset, tmp_path):
    sets = [f"launch.preset={preset}", "launch.device=cpu", f"launch.processes={1 if preset == 'cpu' else 2}"]
    plan = plans.plan("grpo", recipes.load("grpo", "qwen2vl-2b-clevr", sets), tmp_path)
    assert os.path.isfile(value(plan, "--config_file"))
    assert plan.env["CUDA_VISIBLE_DEVICES"] == ""
    zero = preset.startswith("zero")
    assert ("DS_ACCELERATOR" in plan.env) == zero
    assert plan.env["ACCELERATE_USE_CPU"] == ("false" if zero else "true")


def test_nothing_is_reported_to_anybody_unless_asked(tmp_path, monkeypatch):
    """TRL sends what is trained, and on what, to the hub; vLLM looks at the same variable."""
    recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv")
    code = "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    for value, silent in ((None, "True"), ("0", "False")):
        monkeypatch.delenv("DO_NOT_TRACK", raising=False)
        if value is not None:
            monkeypatch.setenv("DO_NOT_TRACK", value)
        made = [plans.plan("grpo", recipe, tmp_path), plans.server_plan(recipe, 1), plans.module_plan("m")]
        assert {plan.env["DO_NOT_TRACK"] for plan in made} == {value or "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | made[0].env, capture_output=True, text=True
        )
        assert done.stdout.strip() == silent, done.stderr


def script(tmp_path, text):
    file = tmp_path / "r1vfree_cli_rank.py"
    head = "import os, sys, time, signal\nfrom pathlib import Path\nfrom r1vfree_cli.core import process as ranks\n"
    file.write_text(head + f"logs = {str(tmp_path / 'logs')!r}\n" + textwrap.dedent(text))
    return plans.Plan([sys.executable, str(file)], {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_ranks_error_comes_back_with_its_class_and_exit_code(tmp_path):
    plan = script(
        tmp_path,
        """
        open(logs + '/rank-1.error.json', 'w').write('{"error": "DataError", "exit_code": 3, "message": "no rows", "hint": "h"}')
        sys.exit(1)
        """,
    )
    with pytest.raises(DataError, match="no rows") as e:
        launch.execute(plan, tmp_path / "logs")
    assert e.value.exit_code == 3 and e.value.hint == "h"


def test_a_killed_rank_shows_how_it_ended_and_the_logs_tail(tmp_path):
    plan = script(tmp_path, "open(logs + '/rank-0.log', 'w').write('allocating 900 GiB')\nos.kill(os.getpid(), 9)")
    with pytest.raises(R1VError, match="SIGKILL") as e:
        launch.execute(plan, tmp_path / "logs")
    assert "allocating 900 GiB" in e.value.details and e.value.exit_code == 1


@pytest.mark.parametrize(
    ("number", "pauses"),
    [(signal.SIGINT, (0,)), (signal.SIGINT, (0.01, 0)), (signal.SIGTERM, (0.01, 0.5, 0))],
)
def test_a_signal_reaches_the_rank_which_may_finish_its_checkpoint(tmp_path, number, pauses):
    """Sent twice at once too, as `timeout` does to a command and its group; and SIGTERM, as schedulers repeat it."""
    plan = script(
        tmp_path,
        """
        def stop(*_):
            time.sleep(1)
            open(logs + '/checkpoint', 'w').write('saved')
            sys.exit(130)
        signal.signal(signal.SIGTERM, stop)
        held = ranks.hold_pid_file(Path(logs) / 'rank-0.pid')
        time.sleep(60)
        """,
    )
    logs = tmp_path / "logs"

    def send():
        while not (logs / "rank-0.pid").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        for pause in pauses:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(Interrupted):
        launch.execute(plan, logs)
    thread.join()
    assert (logs / "checkpoint").read_text() == "saved"


def test_a_rank_that_does_not_stop_in_its_time_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_GRACE_S", "0.5")
    plan = script(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        held = ranks.hold_pid_file(Path(logs) / 'rank-0.pid')
        time.sleep(60)
        """,
    )
    pid_file = tmp_path / "logs" / "rank-0.pid"

    def interrupt():
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        launch.execute(plan, tmp_path / "logs")
    thread.join()
    assert time.monotonic() - begin < 20 and not alive(int(pid_file.read_text()))


def test_a_second_sigint_stops_at_once(tmp_path):
    plan = script(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: open(logs + '/told', 'w').close())
        held = ranks.hold_pid_file(Path(logs) / 'rank-0.pid')
        while True:  # a checkpoint that takes long
            time.sleep(1)
        """,
    )
    logs = tmp_path / "logs"

    def interrupt_twice():
        while not ((logs / "rank-0.pid").exists() and (logs / "rank-0.pid").read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        while not (logs / "told").exists():
            time.sleep(0.05)
        time.sleep(launch.SAME_MOMENT_S)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        launch.execute(plan, logs)
    thread.join()
    assert time.monotonic() - begin < 15 and not alive(int((logs / "rank-0.pid").read_text()))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_children_die_with_a_parent_that_is_killed(tmp_path):
    plan = script(tmp_path, "open(logs + '/child', 'w').write(str(os.getpid()))\ntime.sleep(120)")
    code = f"from pathlib import Path; from r1vfree_cli.launch import processes as launch, plan as plans; launch.execute(plans.Plan({plan.argv!r}), Path({str(tmp_path / 'logs')!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    child = tmp_path / "logs" / "child"
    for _ in range(200):
        if child.exists() and child.read_text():
            break
        time.sleep(0.05)
    pid = int(child.read_text())
    assert alive(pid)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)


def test_a_server_on_this_machine_is_not_looked_for_through_a_proxy(tmp_path, monkeypatch):
    code = "import http.server, sys; http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')"
    (tmp_path / "health").write_text("ok")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(launch, "SERVER_START_S", 5)
    monkeypatch.setattr(launch, "server_plan", lambda _, port: plans.Plan([sys.executable, "-c", code, str(port)]))
    with launch.serving(recipes.load("grpo", "qwen25vl-3b-rlhfv"), tmp_path / "logs") as url:
        assert url.startswith("http://127.0.0.1:")


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path, monkeypatch):
    broken = plans.Plan([sys.executable, "-c", "print('no such model'); raise SystemExit(3)"])
    monkeypatch.setattr(launch, "server_plan", lambda *_: broken)
    recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv")
    with (
        pytest.raises(UsageError, match="before it was ready") as e,
        launch.serving(recipe, tmp_path / "logs"),
    ):
        pass
    assert "no such model" in e.value.details


@pytest.mark.parametrize(
    "sets, held",
    [
        (["model.dtype=bfloat16"], "float32"),
        (["model.dtype=bfloat16", "launch.preset=ddp", "launch.device=cpu"], "float32"),
        (["model.dtype=float16"], "float32"),
        (["model.dtype=bfloat16", "launch.preset=zero2", "launch.device=cpu"], "bfloat16"),
        (["model.dtype=bfloat16", "model.lora={r: 8}"], "bfloat16"),
    ],
)
def test_trained_weights_have_32_bits_somewhere(sets, held):
    """AdamW's steps at a usual learning rate are smaller than what a bfloat16 weight can show."""
    assert recipes.load("grpo", "tiny", sets).weights_dtype == held
