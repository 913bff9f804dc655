"""Plans are pure; execute passes on signals, errors and exit codes of real processes."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request

import psutil
import pytest
import yaml

from r1vfree_cli.config import recipes
from r1vfree_cli.core import process
from r1vfree_cli.core.errors import DataError, Interrupted, R1VError, UsageError
from r1vfree_cli.launch import job as jobs
from r1vfree_cli.launch import plan as plans
from r1vfree_cli.launch import preflight, vllm
from r1vfree_cli.launch import processes as launch


def value(plan, flag):
    return plan.argv[plan.argv.index(flag) + 1]


def test_the_6_plus_2_recipe_trains_on_the_gpus_that_the_judge_does_not_use(tmp_path):
    recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv")
    plan = plans.plan("grpo", recipe, tmp_path)
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5"
    assert value(plan, "--num_processes") == "6" and value(plan, "--config_file").endswith("zero2.yaml")
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


def test_attention_kernels_that_plan_for_each_shape_come_last_unless_asked(tmp_path, monkeypatch):
    name = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
    for value in (None, "0"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
        recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv")
        assert {plans.plan("grpo", recipe, tmp_path).env[name], plans.server_plan(recipe, 1).env[name]} == {
            value or "1"
        }


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
    assert "allocating 900 GiB" in e.value.details and e.value.exit_code == 2


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
    with launch.serving(recipes.load("grpo", "qwen25vl-3b-rlhfv"), tmp_path / "logs") as server:
        assert server.url.startswith("http://127.0.0.1:")


def answering(url) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
        return reply.status == 200
    return False


def test_a_server_that_is_killed_is_started_again_once(tmp_path, monkeypatch, capsys):
    """At the same URL, and what it leaves behind in its group is ended; after the second death it stays down."""
    code = """
import http.server, subprocess, sys
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')"""
    (tmp_path / "health").write_text("ok")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "server_plan", lambda _, port: plans.Plan([sys.executable, "-c", code, str(port)]))
    with launch.serving(recipes.load("grpo", "qwen25vl-3b-rlhfv"), tmp_path / "logs") as server:
        server.watch()
        first = server.process
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        server.watch()
        left = int((tmp_path / "logs" / "reward-server.log").read_text().split()[0])
        assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
        assert server.process.pid != first.pid
        end = time.monotonic() + 30
        while not answering(server.url) and time.monotonic() < end:
            time.sleep(0.05)
        assert answering(server.url)
        server.watch()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        for _ in range(3):
            server.watch()
        assert server.process.poll() is not None and not answering(server.url)
    said = capsys.readouterr().err
    assert said.count("killed by SIGKILL") == 2 and said.count("stays down") == 1


def test_what_a_killed_server_leaves_behind_keeps_no_caller_waiting(tmp_path, monkeypatch):
    """vLLM's engine outlives its server and holds the listening socket: requests would hang, and nobody would watch."""
    code = """
import socket, subprocess, sys, time
s = socket.create_server(("127.0.0.1", int(sys.argv[1])))
s.set_inheritable(True)
subprocess.Popen(["sleep", "600"], close_fds=False)
while True:
    c, _ = s.accept()
    c.recv(1000), c.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n"), c.close()"""
    monkeypatch.setattr(launch, "server_plan", lambda _, port: plans.Plan([sys.executable, "-c", code, str(port)]))
    with launch.serving(recipes.load("grpo", "qwen25vl-3b-rlhfv"), tmp_path / "logs") as server:
        assert answering(server.url)
        os.kill(server.process.pid, signal.SIGKILL)
        port, end = int(server.url.rpartition(":")[2]), time.monotonic() + 10
        said = 0
        while said != errno.ECONNREFUSED and time.monotonic() < end:
            with socket.socket() as caller:
                caller.settimeout(1)
                said = caller.connect_ex(("127.0.0.1", port))
        assert said == errno.ECONNREFUSED


def test_a_port_that_is_taken_is_refused_before_anything_is_started(tmp_path, monkeypatch):
    """The server that is there would answer for the judge."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv", [f"rewards.feedback.serve.port={port}"])
        assert any(f"{port} is in use" in e for e in preflight.check(recipe).errors)
        with pytest.raises(UsageError, match="in use"), launch.serving(recipe, tmp_path):
            pass
    assert not any("in use" in e for e in preflight.check(recipe).errors)


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


@pytest.mark.parametrize(
    "sets, found, said",
    [
        ([], "0.32.0+cpu", None),
        (["train.vllm_mode=server"], "0.32.0", "NCCL"),
        ([], "0.31.0", "needs vLLM 0.32"),
        ([], "0.3.2", "needs vLLM 0.32"),
        (["train.vllm_enable_sleep_mode=true"], "0.32.0", "no sleep mode on a CPU"),
    ],
)
def test_a_vllm_that_cannot_be_right_is_refused_before_the_launch(sets, found, said, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    monkeypatch.setattr(preflight, "installed", lambda name: found if name == "vllm" else None)
    errors = preflight.check(recipes.load("grpo", "tiny", ["train.use_vllm=true", *sets])).errors
    assert [said in e for e in errors] == ([] if said is None else [True])


def vllm_judge(tmp_path, monkeypatch, *, script="#!/bin/sh\n", config=None, vocabulary=("Yes", "No")):
    """The tiny recipe with a judge on a vLLM that is a shell script."""
    command = tmp_path / "vllm"
    command.write_text(script)
    command.chmod(0o755)
    monkeypatch.setenv("R1V_VLLM", str(command))
    judge = tmp_path / "judge"
    judge.mkdir()
    config = config or {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "tie_word_embeddings": True}
    (judge / "config.json").write_text(json.dumps(config))
    (judge / "tokenizer.json").write_text(json.dumps({"model": {"vocab": dict.fromkeys(vocabulary, 1)}}))
    document = yaml.safe_load(recipes.find("grpo", "tiny").read_text())
    serve = {"engine": "vllm", "model": str(judge)}
    document["rewards"] = [{"name": "feedback", "backend": "classify", "serve": serve}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    return recipes.load("grpo", str(tmp_path / "recipe.yaml"), [])


def test_the_command_of_a_judge_on_vllm(tmp_path, monkeypatch):
    plan = plans.server_plan(vllm_judge(tmp_path, monkeypatch), 8123)
    assert plan.argv[:3] == [str(tmp_path / "vllm"), "serve", str(tmp_path / "judge")]
    assert value(plan, "--host") == "127.0.0.1" and value(plan, "--port") == "8123"
    assert value(plan, "--runner") == "pooling" and value(plan, "--dtype") == "float32"
    assert json.loads(value(plan, "--mm-processor-kwargs")) == {"size": {"shortest_edge": 3136, "longest_edge": 3136}}
    assert json.loads(value(plan, "--hf-overrides")) == {
        "architectures": ["Qwen2_5_VLForSequenceClassification"],
        "classifier_from_token": ["No", "Yes"],
        "method": "from_2_way_softmax",
        "text_config": {"tie_word_embeddings": True},
    }


@pytest.mark.parametrize(
    "given, said",
    [
        ({"config": {"architectures": ["Qwen2ForSequenceClassification"]}}, "asks a generative model"),
        ({"vocabulary": ("Yes", "N", "o")}, "not one token each"),
    ],
)
def test_a_judge_that_vllm_would_serve_wrongly_is_refused(given, said, tmp_path, monkeypatch):
    recipe = vllm_judge(tmp_path, monkeypatch, **given)
    with pytest.raises(UsageError, match=said):
        plans.server_plan(recipe, 1)
    assert any(said in e for e in preflight.check(recipe).errors)


def test_a_vllm_that_dies_at_start_is_told_with_its_last_lines(tmp_path, monkeypatch):
    """And with the exceptions further up: its last one is "see root cause above"."""
    frames = "for i in $(seq 30); do echo '  File x'; done"
    script = (
        f"#!/bin/sh\necho '(Worker) torch.OutOfMemoryError: no room'\n{frames}\necho RuntimeError: see above\nexit 1\n"
    )
    recipe = vllm_judge(tmp_path, monkeypatch, script=script)
    with pytest.raises(UsageError, match="ended before it was ready") as raised, launch.serving(recipe, tmp_path):
        pass
    assert raised.value.exit_code == 2
    assert (raised.value.details[0], raised.value.details[-1]) == (
        "torch.OutOfMemoryError: no room",
        "RuntimeError: see above",
    )


def test_a_vllm_whose_interpreter_is_gone_is_told_with_what_to_do(tmp_path, monkeypatch):
    recipe = vllm_judge(tmp_path, monkeypatch, script=f"#!{tmp_path}/gone/python\n")
    with pytest.raises(UsageError, match="cannot run") as raised, launch.serving(recipe, tmp_path):
        pass
    assert "R1V_VLLM" in str(raised.value.hint)


def test_a_judge_that_is_no_model_is_told_once(tmp_path, monkeypatch):
    recipe = vllm_judge(tmp_path, monkeypatch)
    (tmp_path / "judge" / "config.json").unlink()
    told = jobs._dry_run(recipe, preflight.check(recipe, dry_run=True), plans.plan("grpo", recipe, tmp_path / "run"))
    about = [line for line in told["errors"] + told["unchecked"] if "judge" in line and "config.json" in line]
    assert len(about) == 1 and about[0] in told["errors"] and told["server"] is None


def test_a_server_of_another_release_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    (site / "vllm_flash_attn-0.32.0.dist-info").mkdir(parents=True)
    (site / "vllm-0.31.1.dist-info").mkdir()
    recipe = vllm_judge(tmp_path, monkeypatch)
    (tmp_path / "vllm").rename(tmp_path / "bin" / "vllm")
    monkeypatch.setenv("R1V_VLLM", str(tmp_path / "bin" / "vllm"))
    assert any("is vLLM 0.31.1; r1v was run with 0.32" in e for e in preflight.check(recipe).errors)
    (site / "vllm-0.31.1.dist-info").rename(site / "vllm-0.32.0+cpu.dist-info")
    assert not any("vLLM" in e for e in preflight.check(recipe).errors)


def test_no_vllm_is_told_with_both_ways_to_have_one(tmp_path, monkeypatch):
    recipe = vllm_judge(tmp_path, monkeypatch)
    monkeypatch.setenv("R1V_VLLM", str(tmp_path / "judge"))
    assert any("R1V_VLLM" in e for e in preflight.check(recipe).errors)
    monkeypatch.delenv("R1V_VLLM")
    monkeypatch.setenv("PATH", str(tmp_path / "judge"))
    errors = [e for e in preflight.check(recipe).errors if "vLLM is not installed" in e]
    assert len(errors) == 1 and "[vllm]" in errors[0] and "R1V_VLLM" in errors[0]


@pytest.mark.parametrize(
    ("offline", "token", "whoami", "said"),
    [
        (True, "t", None, "HF_HUB_OFFLINE"),
        (False, None, None, "no hub login"),
        (False, "t", ConnectionError("no route"), "ConnectionError"),
        (False, "t", None, None),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_the_launch(monkeypatch, offline, token, whoami, said):
    import huggingface_hub
    from huggingface_hub import constants

    def asked():
        if whoami is not None:
            raise whoami

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub, "whoami", asked)
    recipe = recipes.load("grpo", "tiny", ["train.push_to_hub=true", "train.hub_model_id=me/x"])
    errors = [e for e in preflight.check(recipe).errors if "push_to_hub" in e]
    assert [said in e for e in errors] == ([True] if said else [])
    if said and whoami is None:  # a dry run asks nobody, and tells what it can know
        assert any(said in w for w in preflight.check(recipe, dry_run=True).warnings)


@pytest.mark.parametrize(
    ("visible", "training", "judge"),
    [
        (None, "0,1,2,3,4,5", "6,7"),
        ("7,6,5,4,3,2,1,0", "7,6,5,4,3,2", "1,0"),
        ("8,9,10,11,12,13,14,15", "8,9,10,11,12,13", "14,15"),
        (",".join(f"GPU-{i}ab" for i in range(8)), ",".join(f"GPU-{i}ab" for i in range(6)), "GPU-6ab,GPU-7ab"),
    ],
)
def test_the_gpus_that_the_user_chose_are_indexed_into(visible, training, judge, tmp_path, monkeypatch):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv")
    assert plans.plan("grpo", recipe, tmp_path).env["CUDA_VISIBLE_DEVICES"] == training
    assert plans.server_plan(recipe, 1).env["CUDA_VISIBLE_DEVICES"] == judge
    assert vllm.environment([6, 7], on_cpu=False)["CUDA_VISIBLE_DEVICES"] == judge


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        ("0", 1),
        ("1,0", 2),
        ("0,-1,1", 1),
        ("GPU-a, GPU-b", 2),
        ("MIG-a,MIG-b,MIG-c", 3),
        ("0,1,2", 2),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(visible, count, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(process, "Path", lambda path: tmp_path)
    assert process.gpu_count() == count


def test_threads_are_of_the_cores_that_r1v_was_given(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    recipe = recipes.load("grpo", "qwen25vl-3b-rlhfv")
    assert plans.plan("grpo", recipe, tmp_path).env["OMP_NUM_THREADS"] == "2"
    assert plans.module_plan("m").env["OMP_NUM_THREADS"] == "12"
