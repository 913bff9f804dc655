"""`r1v view`: the page's data, its limits, and the page itself in a headless browser."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pyarrow.parquet as pq
import pytest
import uvicorn
from report_dirs import make_run

from r1vfree_cli.report.viewer import Rollouts, app
from r1vfree_cli.training.recorder import Rollout, write_rollouts

HOSTILE = "</script><script>document.title='owned'</script><think>a</think><answer>red</answer>"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two runs on a real server; yields (URL, first run dir)."""
    base = tmp_path_factory.mktemp("view")
    runs = [make_run(base / "one", steps=24, completion=HOSTILE), make_run(base / "two", steps=24)]
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app([Rollouts(r, r.name) for r in runs]), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", runs[0]
    server.should_exit = True
    thread.join(10)


def get(url, **query):
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=20) as reply:
        return json.load(reply)


def test_a_step_shows_what_the_file_holds(served):
    url, run = served
    step = get(f"{url}/api/runs")[0]["steps"][0]
    rows = pq.read_table(run / "rollouts" / f"step-{step:08d}.parquet").to_pylist()
    groups = get(f"{url}/api/step", run=0, step=step)
    samples = [s for g in groups for s in g["samples"]]
    assert [s["completion"] for s in samples] == [r["completion"] for r in rows]
    assert [s["rewards"]["feedback"] for s in samples] == [r["rewards/feedback"] for r in rows]
    assert [s["advantage"] for s in samples] == [r["advantage"] for r in rows]
    for group in groups:
        texts = [s["completion"] for s in group["samples"]]
        assert [s["duplicate"] for s in group["samples"]] == [texts.count(t) > 1 for t in texts]


def test_a_question_and_a_text_are_found_across_steps(served):
    url, _ = served
    steps = get(f"{url}/api/runs")[0]["steps"]
    row = get(f"{url}/api/step", run=0, step=steps[0])[0]["id"]
    assert {g["id"] for g in get(f"{url}/api/question", run=0, id=row)} == {row}
    hits = get(f"{url}/api/search", run=0, text="OWNED", start=0)["groups"]
    assert hits and all(any("owned" in s["completion"] for s in g["samples"]) for g in hits)
    assert not get(f"{url}/api/search", run=0, text="no such words", start=0)["groups"]


def test_pictures_are_those_of_the_rows_and_wrong_requests_are_refused(served):
    url, _ = served
    row = get(f"{url}/api/step", run=0, step=get(f"{url}/api/runs")[0]["steps"][0])[0]["id"]
    with urllib.request.urlopen(f"{url}/image?run=0&id={row}", timeout=20) as reply:
        assert reply.read(4) in (b"\x89PNG", b"\xff\xd8\xff\xe0")
    for path in ("image?run=0&id=none", "api/step?run=0&step=999", "api/step?run=7&step=1", "api/step?step=x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/{path}", timeout=20)
    strange = urllib.request.Request(url, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(strange, timeout=20)


def test_thousands_of_steps_stay_quick_and_new_ones_are_seen(tmp_path):
    run = make_run(tmp_path / "run", steps=24)
    rollouts = Rollouts(run, "run")
    one = next((run / "rollouts").glob("*.parquet"))
    for step in range(100, 3100):
        (run / "rollouts" / f"step-{step:08d}.parquet").hardlink_to(one)
    begin = time.process_time()
    assert len(rollouts.about()["steps"]) >= 3000 and rollouts.groups(2500)
    assert time.process_time() - begin < 1  # one file is read, not 3,000
    write_rollouts(rollouts.files, 4000, [Rollout(4000, 0, "row-1", "q", "c", 3, False, {"format": 1.0})])
    assert rollouts.steps()[-1] == 4000


def test_an_sft_run_and_a_taken_port_are_told(tmp_path):
    run = make_run(tmp_path / "run", steps=24)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "recipe.yaml").write_text("model: {name: x}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for code, word, args in (
            (3, "no rollouts", [str(tmp_path / "sft")]),
            (3, "does not exist", [str(tmp_path / "rnu")]),
            (2, "--port", [str(run), "--port", port]),
        ):
            command = [sys.executable, "-m", "r1vfree_cli.cli", "view", "--no-open", *args]
            command[1:3] = ["-c", "from r1vfree_cli.cli import main; main()"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == code and word in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("screen", [None, "BROWSER"])
def test_a_text_browser_does_not_take_the_terminal_of_a_machine_without_a_screen(tmp_path, screen):
    run = make_run(tmp_path / "run", steps=24)
    for name in ("www-browser", "links", "lynx", "w3m"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho $1 >{tmp_path}/opened\n")
        (tmp_path / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")}
    env |= {"TERM": "xterm", "PATH": f"{tmp_path}:{env['PATH']}"} | ({screen: str(tmp_path / "lynx")} if screen else {})
    command = [sys.executable, "-c", "from r1vfree_cli.cli import main; main()", "view", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as viewer:
        url = re.search(r"http://\S+", viewer.stderr.readline())[0]
        for _ in range(100):
            with contextlib.suppress(OSError), urllib.request.urlopen(url) as page:
                assert b"rollouts" in page.read()
                break
            time.sleep(0.1)
        viewer.send_signal(signal.SIGINT)
        assert viewer.wait(30) in (0, 130)
    assert (tmp_path / "opened").exists() == bool(screen)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (390, 0)])
def test_the_page_in_a_browser(served, tmp_path, width, scheme):
    url, _ = served
    command = "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    command += "--disable-background-networking --disable-component-update --virtual-time-budget=6000 --dump-dom "
    command += f"--window-size={width},800 --blink-settings=preferredColorScheme={scheme} --user-data-dir={tmp_path}"
    done = subprocess.run([*command.split(), url], capture_output=True, text=True, timeout=90)
    assert "<title>r1v: rollouts</title>" in done.stdout, "a completion's script ran"
    assert done.stdout.count('class="group"') >= 2 and "&lt;script&gt;" in done.stdout
    assert re.search(r"one, step \d+: \d+ of \d+ groups", done.stdout) and "two, step" in done.stdout
