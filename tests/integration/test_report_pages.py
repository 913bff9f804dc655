"""`report()` on run and eval dirs as they are on disk: whole, killed, damaged, hostile."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from report_dirs import drawing, make_eval, make_run, questions

from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.report import report

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> | `a` **b** ```\n\n\n\n# h\n</pre></details>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes, balanced tags, text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for t, attrs in self.elements if t == tag]


def read(out: Path) -> tuple[Page, str]:
    return Page((out / "report.html").read_text()), (out / "report.md").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report about two evals and a run with a hostile completion."""
    base = tmp_path_factory.mktemp("report")
    evals = [make_eval(base / "base", right=0.4), make_eval(base / "trained", right=0.8, seed=1)]
    run = make_run(base / "run", steps=24, completion=HOSTILE)
    document = report([*evals, run], base / "out")
    return base, document, *read(base / "out")


def test_all_files_are_there_and_named(made):
    base, document, _, md = made
    names = {p.name for p in (base / "out").iterdir()}
    assert names == set(document["files"]) >= {"report.md", "report.html", "report-hallusionbench.png"}
    assert len([n for n in names if re.fullmatch(r"report-curve-\d\d-kl\.png", n)]) == 1
    json.dumps(document, allow_nan=False)
    for name in re.findall(r'src="([^"]+)"', md):
        assert name in names
    for name in names - {"report.md", "report.html"}:
        Image.open(base / "out" / name).verify()
    assert document["missing"] == [], document["missing"]


def test_html_needs_no_network_and_no_script(made):
    page = made[2]
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            value = attrs.get(name) or "#"
            assert value.startswith(("#", "data:image/")), (tag, name, value[:80])
    assert "url(http" not in (made[0] / "out" / "report.html").read_text()


def test_html_is_accessible(made):
    page = made[2]
    assert page.all("img") and all(img.get("alt", "").strip() for img in page.all("img"))
    plots = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(plots) == len(page.all("svg")) >= 8 and all(len(svg["aria-label"]) > 20 for svg in plots)
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a")]
    assert targets and set(targets) <= set(ids)
    assert page.all("html")[0]["lang"] == "en"


def test_a_completion_with_script_stays_text(made):
    _, _, page, md = made
    assert "<script>alert(1)</script> <img src=x onerror=alert(2)>" in page.text
    rendered = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(md)
    assert "<script" not in rendered and "onerror=alert(2)>" not in rendered and "<h1>h" not in rendered
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in rendered
    # The text comes through whole, blank lines included.
    assert HOSTILE in md


def test_the_table_shows_the_scores_to_the_count(made):
    base, _, page, md = made
    scores = [json.loads((base / name / "scores.json").read_text()) for name in ("base", "trained")]
    for name, own in zip(("base", "trained"), scores):
        for metric, (right, total) in own["counts"].items():
            cell = f"{own['metrics'][metric]:.1f}"
            assert any(c.startswith(cell) and f"{right}/{total}" in c for c in page.cells), (name, metric)
            assert f"<sub>{right}/{total}" in md
    assert any(c.startswith("always yes") for c in page.cells) and any(c.startswith("always no") for c in page.cells)
    best = [max(s["metrics"][m] for s in scores) for m in scores[0]["metrics"]]
    strong = re.findall(r"<td><strong>(.*?)</strong>", (base / "out" / "report.html").read_text())
    assert sorted(strong) == sorted(f"{value:.1f}" for value in best)
    assert all(f"**{value:.1f}**" in md for value in best)


def test_paired_figures_are_those_of_the_statistics(made):
    base, document, page, _ = made
    (found,) = document["comparisons"]
    assert (found["label"], found["reference"]) == ("trained", "base")
    scores = [json.loads((base / n / "scores.json").read_text())["metrics"] for n in ("base", "trained")]
    paired = found["metrics"]["aAcc"]
    assert paired["difference"] == pytest.approx(scores[1]["aAcc"] - scores[0]["aAcc"])
    low, high = paired["interval"]
    text = f"[{low:+.1f}, {high:+.1f}]".replace("-", "−")
    assert any(text in c and "p " in c for c in page.cells)
    changed = found["mcnemar"]
    assert f"{changed['gained']} questions gained and {changed['lost']} lost" in page.text


def test_changed_questions_show_figure_and_both_replies(made):
    _, document, page, _ = made
    gained = document["comparisons"][0]["gained"]
    assert gained and "Gained:" in page.text
    assert any("figure of the question" in img["alt"] for img in page.all("img"))
    assert "text only" in page.text or not any("VS_chart" in g and "_0_" in g for g in gained)


def test_changed_questions_carry_the_verdicts_of_the_judge(made):
    base, _, _, md = made
    judged = {n: json.loads((base / n / "judged.json").read_text()) for n in ("base", "trained")}
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    codes = {n: {tuple(str(r[k]) for k in names): str(r["gpt4v_output_gpt_check"]) for r in judged[n]} for n in judged}
    place = r"\*\*(V[DS]) (\w+), set (\w+), figure (\w+), question (\w+)\*\*.*?\nbase, (\w+):.*?\ntrained, (\w+):"
    shown = re.findall(place, md, re.DOTALL)
    assert len(shown) >= 8
    word = {"0": "wrong", "1": "right", "2": "unclear"}
    for *key, before, after in shown:
        assert (before, after) == (word[codes["base"][tuple(key)]], word[codes["trained"][tuple(key)]]), key


def test_rollouts_are_shown_best_advantage_first(made):
    text = (made[0] / "out" / "report.html").read_text()
    groups = [re.findall(r"advantage\D*?([+−±][\d.]+)", g) for g in text.split('class="group"')[1:]]
    assert len(groups) >= 2 and all(len(found) == 8 for found in groups)
    for found in groups:
        values = [float(v.replace("−", "-").replace("±", "")) for v in found]
        assert values == sorted(values, reverse=True) and values[0] > values[-1]


def test_not_scored_is_said_and_is_not_zero(made):
    _, _, page, md = made
    assert "feedback not scored" in page.text
    assert "| not scored |" in md


def test_held_out_accuracy_before_and_after(made):
    page = made[2]
    i = next(i for i, c in enumerate(page.cells) if c == "accuracy, greedy")
    assert page.cells[i + 1 : i + 4] == ["41.2", "53.8", "+12.6"]


def test_contract_versions_and_commands_are_printed(made):
    page = made[2]
    assert "r1v grpo --recipe tiny --set train.max_steps=120" in page.text
    assert "accelerate.commands.launch" in page.text and "a" * 64 in page.text and "2.15.0" in page.text
    assert "env-value" not in page.text


def colours(picture: bytes) -> set[tuple[int, int, int]]:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    return {colour for n, colour in image.getcolors(1 << 20) if n > 200}


def test_each_rollout_has_the_image_of_its_own_row(tmp_path):
    """Pictures are found by id, not by position: every row's image has a colour of its own."""
    run = make_run(tmp_path / "run", plain=True, steps=24)
    rows = []
    for i in reversed(range(8)):
        out = io.BytesIO()
        Image.new("RGB", (64, 64), (i * 30, 255 - i * 30, 7)).save(out, "PNG")
        rows.append({"id": f"row-{i}", "images": [{"bytes": out.getvalue(), "path": None}]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "run-data" / "train-00000.parquet", row_group_size=3)
    report([run], tmp_path / "out")
    md = (tmp_path / "out" / "report.md").read_text()
    shown = re.findall(r'question: What colour is shape (\d)\?"', md)
    files = re.findall(r'<img src="([^"]+)" width="220" alt="image of the question: What colour is shape \d', md)
    assert len(shown) == len(files) > 2
    for i, file in zip(map(int, shown), files):
        assert colours((tmp_path / "out" / file).read_bytes()) == {(i * 30, 255 - i * 30, 7)}


def test_images_of_cached_data_are_found_by_the_runs_seed(tmp_path, monkeypatch):
    """`shapes` without a seed of its own is drawn with the run's seed; another seed's images are not shown."""
    from r1vfree_cli.data.load import ensure_rows
    from r1vfree_cli.report.gallery import row_images

    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))
    folder = ensure_rows("shapes?n=8&seed=7", "train")
    rows = pq.read_table(next(folder.glob("*.parquet"))).to_pylist()
    wanted = {rows[3]["id"]: rows[3]["images"][0]["bytes"]}
    recipe: dict = {"data": {"path": "shapes?n=8", "split": "train"}, "train": {"seed": 7}}
    assert row_images(recipe, set(wanted)) == (wanted, None)
    found, note = row_images(recipe | {"train": {"seed": 8}}, set(wanted))
    assert found == {} and "not on this machine" in note
    assert [p.name for p in (tmp_path / "cache" / "data").iterdir() if p.is_dir()] == [folder.name]  # nothing was drawn


def test_a_killed_run_is_reported_as_far_as_it_goes(tmp_path):
    run = make_run(tmp_path / "run", plain=True, steps=6, state="running")
    for name in ("summary.json", "launch.json"):
        (run / name).unlink()
    shutil.rmtree(run / "final")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "rew')
    (run / "rollouts" / "step-00000001.parquet").write_bytes(b"PAR1 half of a file")
    shutil.rmtree(tmp_path / "run-data")
    document = report([run], tmp_path / "out")
    page, md = read(tmp_path / "out")
    missing = "\n".join(m["what"] for m in document["missing"])
    for part in (
        "not finished: running",
        "last line is cut",
        "summary.json",
        "r1v.json",
        "launch.json",
        "step-00000001",
    ):
        assert part in missing and part in page.text
    assert "Held-out" not in page.text and "Run contract" not in page.text
    assert "What is missing" in md
    assert document["runs"][0]["step"] == 6


def test_rows_that_are_not_on_this_machine_are_said(tmp_path):
    run = make_run(tmp_path / "run", plain=True, steps=6)
    shutil.rmtree(tmp_path / "run-data")
    document = report([run], tmp_path / "out")
    assert any("not on this machine" in m["what"] for m in document["missing"])
    assert "no image" in read(tmp_path / "out")[0].text


def test_an_image_that_is_none_does_not_end_the_report(tmp_path):
    run = make_run(tmp_path / "run", plain=True, steps=6)
    bad = [drawing(1)[:80], b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n" + b"\0" * 50]
    rows = [{"id": f"row-{i}", "images": [{"bytes": bad[i % 4], "path": "/etc/passwd"}]} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "run-data" / "train-00000.parquet")
    report([run], tmp_path / "out")
    page, _ = read(tmp_path / "out")
    assert "no image" in page.text and not page.all("img")


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "launch.json", "recipe.yaml", "final/r1v.json"])
@pytest.mark.parametrize("text", ["[1, 2]", "\x00\xff"])
def test_damaged_side_files_are_left_out(tmp_path, name, text):
    run = make_run(tmp_path / "run", plain=True, steps=2)
    shutil.rmtree(run / "rollouts")
    (run / name).write_text(text)
    report([run], tmp_path / "out")


def test_values_that_r1v_does_not_write_are_refused(tmp_path):
    run = make_run(tmp_path / "run", plain=True, steps=2)
    (run / "summary.json").write_text('{"seconds": [], "heldout_accuracy": 3}')
    with pytest.raises(DataError, match="other values than r1v writes"):
        report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_planted_key_reaches_no_file(tmp_path, monkeypatch):
    key = "planted-0123456789"
    monkeypatch.setenv("MY_JUDGE_KEY", key)
    run = make_run(tmp_path / "run", plain=True, steps=2, completion=f"<answer>the key is {key}</answer>")
    document = make_eval(tmp_path / "eval", reply=f"<answer>yes {key}</answer>")
    for path in (run / "launch.json", document / "eval.json"):
        found = json.loads(path.read_text())
        extra = ["--judge-base-url", f"https://user:{key}@host/v1", "--api-key", key]
        if "commands" in found:
            found["commands"]["judge"] = [*found["commands"]["judge"], *extra]
        else:
            found["command"] = " ".join([found["command"], *extra])
        found["env"] = {"X": key}
        path.write_text(json.dumps(found))
    (run / "status.json").write_text(json.dumps({"state": "failed", "reason": f"401 with {key}"}))
    result = report([run, document], tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert key.encode() not in file.read_bytes(), file.name
    assert key not in json.dumps(result)


def test_a_report_replaces_its_own_files_and_only_those(tmp_path):
    run = make_run(tmp_path / "run", plain=True, steps=2)
    out = tmp_path / "out"
    report([run], out)
    first = (out / "report.html").stat().st_ino
    (out / "report-mine.png").write_bytes(drawing(1))
    (out / "notes.txt").write_text("mine")
    stale = out / "report-curve-old.png"
    shutil.copy(next(out.glob("report-curve-*-reward.png")), stale)
    report([run], out)
    assert (out / "report.html").stat().st_ino != first
    assert not stale.exists() and (out / "report-mine.png").exists() and (out / "notes.txt").exists()
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]


def test_somebody_elses_file_is_replaced_only_when_asked(tmp_path):
    run = make_run(tmp_path / "run", plain=True, steps=2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("# my own report\n")
    with pytest.raises(UsageError, match="did not write") as e:
        report([run], out)
    assert "report.md" in e.value.details[0]
    assert [p.name for p in out.iterdir()] == ["report.md"] and (out / "report.md").read_text() == "# my own report\n"
    report([run], out, overwrite=True)
    assert "r1v report" in (out / "report.md").read_text()


def test_bad_input_writes_nothing(tmp_path):
    good = make_eval(tmp_path / "a")
    other = make_eval(tmp_path / "b", protocol="vlmevalkit")
    with pytest.raises(UsageError) as mixed:
        report([good, other], tmp_path / "out")
    with pytest.raises(DataError) as neither:
        report([good, tmp_path / "figures"], tmp_path / "out")
    assert (mixed.value.exit_code, neither.value.exit_code) == (2, 3)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="is a file"):
        report([good], tmp_path / "a" / "scores.json")


def test_evals_over_other_questions_are_refused(tmp_path):
    a = make_eval(tmp_path / "a")
    asked = questions()
    asked[0]["set_id"] = "9"
    b = make_eval(tmp_path / "b", asked=asked)
    with pytest.raises(DataError, match="another question set"):
        report([a, b], tmp_path / "out")
    c = make_eval(tmp_path / "c", asked=questions()[:-1])
    with pytest.raises(DataError, match="numbers of questions"):
        report([a, c], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_judged_questions_there_is_a_table_and_no_p(tmp_path):
    a, b = make_eval(tmp_path / "a"), make_eval(tmp_path / "b", seed=1)
    (a / "judged.json").write_text("{")
    document = report([a, b], tmp_path / "out")
    page, _ = read(tmp_path / "out")
    assert document["comparisons"] == [] and "p =" not in page.text and "p <" not in page.text
    missing = [m["what"] for m in document["missing"]]
    assert any("judged.json is damaged" in m for m in missing) and any("no paired comparison" in m for m in missing)


def test_different_judges_are_said(tmp_path):
    a, b = make_eval(tmp_path / "a"), make_eval(tmp_path / "b", seed=1)
    scores = json.loads((b / "scores.json").read_text())
    scores["settings"]["judge"] = {"kind": "chat", "model": "big", "judge_input": "reply"}
    (b / "scores.json").write_text(json.dumps(scores))
    report([a, b], tmp_path / "out")
    page, md = read(tmp_path / "out")
    for text in (page.text, md):
        assert "different judges" in text and "chat big shown the reply" in text


def test_a_report_imports_no_torch(tmp_path):
    run, found = make_run(tmp_path / "run", plain=True, steps=2), make_eval(tmp_path / "eval")
    code = (
        "import sys; from pathlib import Path; from r1vfree_cli.report import report\n"
        f"report([Path({str(run)!r}), Path({str(found)!r})], Path({str(tmp_path / 'out')!r}))\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def chromium(page: Path, text: str, probe: str, profile: Path, *, width: int, scheme: int = 1) -> str:
    """What the script `probe` makes of the page in a headless browser; `scheme` 0 is dark, 1 light."""
    policy = re.search(r"<meta http-equiv=.*?>", text)
    assert policy
    script = f"<script>document.title = {probe}</script>"
    page.write_text(text.replace(policy.group(), "").replace("</body>", script + "</body>"))
    command = "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    command += f"--disable-background-networking --disable-component-update --window-size={width},800 --dump-dom "
    command += f"--blink-settings=preferredColorScheme={scheme} --user-data-dir={profile} {page.as_uri()}"
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-500:]
    return title[1]


browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")


@browser
def test_nothing_is_wider_than_a_phone_and_dark_is_dark(made, tmp_path):
    """The page at 375 px does not scroll sideways, and its background follows the reader's scheme."""
    text = (made[0] / "out" / "report.html").read_text()
    probe = "[document.documentElement.scrollWidth, innerWidth, getComputedStyle(document.body).backgroundColor]"
    seen = []
    for scheme in (0, 1):  # dark, light
        found = chromium(tmp_path / "page.html", text, probe, tmp_path / str(scheme), width=375, scheme=scheme)
        content, window, background = found.split(",", 2)
        assert int(content) <= int(window) <= 500
        seen.append(background)
    assert seen == ["rgb(16, 20, 24)", "rgb(255, 255, 255)"]


@browser
def test_long_words_stay_inside_their_card(tmp_path):
    asked = [q | {"question": "w" * 400} for q in questions()]
    evals = [make_eval(tmp_path / name, seed=i, asked=asked) for i, name in enumerate(("a", "b"))]
    report(evals, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    over = "[...document.querySelectorAll('article.question')].map(c => c.scrollWidth - c.clientWidth)"
    found = chromium(tmp_path / "page.html", text, f"{over}.join()", tmp_path / "profile", width=1280)
    assert found and {int(n) for n in found.split(",")} == {0}


def test_each_stage_shows_its_own_command_and_the_figures_are_found(tmp_path):
    """An eval dir that was judged again: how the replies were made, and where its figures lie, is still known."""
    a = make_eval(tmp_path / "a", seed=1)
    b = make_eval(tmp_path / "b", seed=2)
    for path in (a, b):
        state = json.loads((path / "eval.json").read_text())
        state["commands"]["judge"] = ["/usr/bin/r1v", "eval-hallusion", "--out=x", "--stage=judge"]
        state["commands"] = {"generate": state["commands"].pop("score"), **state["commands"]}
        (path / "eval.json").write_text(json.dumps(state))
    result = report([a, b], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("r1v eval-hallusion --out=x --stage=judge") == 2
    assert text.count("r1v eval-hallusion --predictions=") == 2
    assert any(name.startswith("report-image-") for name in result["files"])
