"""Data from every source's real layout to rows that load: counted drops, whole or nothing, the same bytes again."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.data import load, sources
from r1vfree_cli.data.prepare import prepare
from tests.fuzz import machine

SHARED = Path(__file__).parents[3] / "shared"


def picture(seed: int, size=(40, 32), mode: str = "RGB", kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, kind)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_hub_parquet(path: Path, records: list[dict], image: str | None = "image") -> None:
    """As `push_to_hub` writes: parquet with the image feature in the schema, images as {bytes, path}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = datasets.Dataset.from_list(records)
    if image:
        ds = ds.cast_column(image, datasets.Image())
    ds.to_parquet(path)


def write_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def rows_of(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def photos(folder: Path, count: int) -> Path:
    """A folder of `count` pictures and a questions.jsonl beside them."""
    (folder / "img").mkdir(parents=True)
    for i in range(count):
        (folder / "img" / f"{i}.png").write_bytes(picture(i))
    return write_lines(
        folder / "questions.jsonl",
        [{"id": f"q{i}", "image": f"img/{i}.png", "problem": f"What {i}?"} for i in range(count)],
    )


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith((".staging", ".old")))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))


# --- every source, in its real layout --------------------------------------------------------------------------

PIC = {"bytes": picture(1), "path": "1.png"}
R1V = {"image": PIC, "problem": "How many items are there?", "solution": "<answer> 3 </answer>"}
RLHF_V = {
    "ds_name": "RLHF-V",
    "image": PIC,
    "text": json.dumps({"question": "What is it?", "chosen": "A cup.", "rejected": "A cat."}),
    "origin_dataset": "COCO",
    "origin_split": "{}",
    "idx": 0,
    "image_path": "RLHF-V/Images/0.png",
}
LAYOUTS = {
    "rlhf-v": ("RLHF-V-Dataset.parquet", RLHF_V, ("What is it?", "A cup.", None)),
    "r1v-free": (
        "data/train-00000-of-00001.parquet",
        RLHF_V | {"problem": "What is this?", "solution": "<answer> A cup. </answer>"},
        ("What is this?", "A cup.", None),
    ),
    "clevr-count": ("data/train-00000-of-00002.parquet", R1V, ("How many items are there?", "3", None)),
    "clevr-complex": (
        "data/train-00000-of-00001.parquet",
        R1V | {"solution": "<answer> yes </answer>"},
        ("How many items are there?", "yes", None),
    ),
    "geoqa": (
        "data/train-00000-of-00001.parquet",
        R1V | {"problem": "<image>Find AB.", "solution": "<answer> 5\\sqrt{2} </answer>"},
        ("Find AB.", "5\\sqrt{2}", None),
    ),
    "clevr-r1": (
        "data/train-00000-of-00015.parquet",
        R1V | {"thinking": "<think>\nOne, two, three.\n</think>"},
        ("How many items are there?", "3", "One, two, three."),
    ),
    "parquet": ("mine.parquet", {"id": "a", **R1V}, ("How many items are there?", "3", None)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_local_copy_of_each_source_becomes_rows(name, tmp_path):
    file, record, (problem, solution, thinking) = LAYOUTS[name]
    other = (
        record
        | {"image": {"bytes": picture(2, mode="RGBA"), "path": "2.png"}}
        | ({"id": "b"} if "id" in record else {})
    )
    write_hub_parquet(tmp_path / "in" / file, [record, other])
    summary = prepare(name, tmp_path / "out", input=str(tmp_path / "in"))
    assert summary["rows"] == summary["read"] == 2 and summary["dropped"] == {}
    rows = load.load_rows(str(tmp_path / "out"))
    assert rows.column_names == ["id", "images", "problem", "solution", "thinking", "source"]
    assert rows[0] | {"images": 0, "id": 0} == {
        "id": 0,
        "images": 0,
        "problem": problem,
        "solution": solution,
        "thinking": thinking,
        "source": name,
    }
    assert len(set(rows["id"])) == 2
    for row, seed in zip(rows, (1, 2)):
        (image,) = row["images"]
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels(picture(seed)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_source_reads_a_save_to_disk_folder_too(name, tmp_path):
    _, record, (problem, _, _) = LAYOUTS[name]
    ds = datasets.Dataset.from_list([record]).cast_column("image", datasets.Image())
    ds.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": ds, "test": ds}).save_to_disk(tmp_path / "two")
    assert prepare(name, tmp_path / "a", input=str(tmp_path / "one"))["rows"] == 1
    summary = prepare(name, tmp_path / "b", input=str(tmp_path / "two"))
    assert {s: v["rows"] for s, v in summary["splits"].items()} == {"train": 1, "test": 1}
    assert load.load_rows(str(tmp_path / "b"), "test")[0]["problem"] == problem


@pytest.mark.parametrize("limit", [None, 30])
def test_no_row_is_lost_between_batches_of_a_saved_data_set(limit, tmp_path):
    """Rows on the hub are read in the same way."""
    records = [{"problem": f"What is {i}?", "image": {"bytes": picture(i), "path": None}} for i in range(37)]
    datasets.Dataset.from_list(records).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "in")
    summary = prepare("files", tmp_path / "out", input=str(tmp_path / "in"), limit=limit)
    rows = rows_of(tmp_path / "out")
    assert summary["rows"] == len(rows) == (limit or 37) and len({r["problem"] for r in rows}) == len(rows)
    for row in rows:
        (image,) = row["images"]
        assert np.array_equal(pixels(image["bytes"]), pixels(picture(int(row["problem"].split()[-1][:-1]))))


def test_rlhf_v_takes_question_and_chosen_together_whatever_stands_beside(tmp_path):
    beside = {"problem": "Other?", "solution": "<answer> other </answer>"}
    columns = {"image": PIC, "question": "What?", "chosen": "This.", "rejected": "That."}
    for name, record in (("text", RLHF_V), ("columns", columns)):
        write_hub_parquet(tmp_path / name / "train.parquet", [record | beside])
        prepare("rlhf-v", tmp_path / f"{name}-out", input=str(tmp_path / name))
        wanted = ("What is it?", "A cup.") if name == "text" else ("What?", "This.")
        (row,) = rows_of(tmp_path / f"{name}-out")
        assert (row["problem"], row["solution"]) == wanted
    write_hub_parquet(tmp_path / "free" / "train.parquet", [columns | {"problem": "Other?", "solution": None}])
    prepare("r1v-free", tmp_path / "free-out", input=str(tmp_path / "free"))
    (row,) = rows_of(tmp_path / "free-out")
    assert (row["problem"], row["solution"]) == ("Other?", None), "chosen answers question, not problem"


def test_rlhf_v_newer_columns_and_bad_text(tmp_path):
    newer = {"image": PIC, "question": "What?", "chosen": "This.", "rejected": "That."}
    write_hub_parquet(tmp_path / "new" / "train-00000-of-00001.parquet", [newer])
    prepare("rlhf-v", tmp_path / "a", input=str(tmp_path / "new"))
    assert rows_of(tmp_path / "a")[0]["solution"] == "This."
    write_hub_parquet(tmp_path / "old" / "x.parquet", [RLHF_V, RLHF_V | {"text": "{half"}, RLHF_V | {"text": "[]"}])
    assert prepare("rlhf-v", tmp_path / "b", input=str(tmp_path / "old"))["dropped"] == {"text is not JSON": 2}


def test_hallusionbench_hub_copy_keeps_text_only_questions(tmp_path, capsys):
    keys = {"category": "VS", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": "1"}
    keys |= {"sample_note": "import", "question": "Is it?", "gt_answer_details": "It is", "gt_answer": "1"}
    shown = keys | {"question_id": "0", "filename": "./VS/chart/0_1.png", "image": PIC}
    asked = keys | {"question_id": "1", "filename": None, "visual_input": "0", "figure_id": "0", "gt_answer": "0"}
    write_hub_parquet(tmp_path / "in" / "data" / "image-00000-of-00001.parquet", [shown])
    write_hub_parquet(tmp_path / "in" / "data" / "non_image-00000-of-00001.parquet", [asked], image=None)
    summary = prepare("hallusionbench", tmp_path / "out", input=str(tmp_path / "in"))
    assert summary["splits"]["test"]["rows"] == 2
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert [len(rows[i]["images"]) for i in ("VS/chart/1/0/1/0", "VS/chart/0/0/0/1")] == [1, 0]
    assert [r["solution"] for r in rows.values()] == ["yes", "no"]
    # Training takes no rows without an image, and says so.
    assert load.load_rows(str(tmp_path / "out"), "test")["id"] == ["VS/chart/1/0/1/0"]
    assert "dropped 1 row without an image" in capsys.readouterr().err


def test_the_real_hallusionbench_questions_have_1129_different_ids(tmp_path):
    questions = SHARED / "hallusionbench" / "HallusionBench.json"
    if not questions.is_file():
        pytest.skip("no HallusionBench.json in ../shared")
    for record in json.loads(questions.read_text()):
        if record["filename"]:
            path = tmp_path / "images" / record["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PIC["bytes"])
    summary = prepare("hallusionbench", tmp_path / "out", input=str(questions), images=tmp_path / "images")
    assert summary["rows"] == 1129 and summary["dropped"] == {}
    assert sum(not row["images"] for row in rows_of(tmp_path / "out")) == 178


def test_jsonl_and_image_folders(tmp_path):
    photos(tmp_path / "lines", 3)
    assert prepare("jsonl", tmp_path / "a", input=str(tmp_path / "lines" / "questions.jsonl"))["rows"] == 3
    assert prepare("jsonl", tmp_path / "b", input=str(tmp_path / "lines"))["sha256"] == load.data_sha256(
        str(tmp_path / "a")
    )
    array = tmp_path / "lines" / "array.json"
    array.write_text(json.dumps([{"image": "0.png", "question": "What?", "answer": 3}, 7]))
    summary = prepare("jsonl", tmp_path / "c", input=str(array), images=tmp_path / "lines" / "img")
    assert summary["dropped"] == {"record is not an object": 1}
    assert [r["solution"] for r in rows_of(tmp_path / "c")] == ["3"]
    for split in ("train", "test"):  # the imagefolder layout of `datasets`
        folder = tmp_path / "imagefolder" / split
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(picture(5))
        write_lines(folder / "metadata.jsonl", [{"file_name": "x.png", "problem": f"A {split}?"}])
    prepare("jsonl", tmp_path / "d", input=str(tmp_path / "imagefolder"))
    assert load.load_rows(str(tmp_path / "d"), "test")[0]["problem"] == "A test?"
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "x.png").write_bytes(picture(5))
    (tmp_path / "csv" / "metadata.csv").write_text('file_name,problem\nx.png,"What, then?"\n')
    prepare("jsonl", tmp_path / "e", input=str(tmp_path / "csv"))
    assert rows_of(tmp_path / "e")[0]["problem"] == "What, then?"


def test_the_real_photographs_give_32_rows(tmp_path):
    skimage = pytest.importorskip("skimage")
    questions = SHARED / "photos" / "questions.jsonl"
    if not questions.is_file():
        pytest.skip("no photos/questions.jsonl in ../shared")
    images = Path(skimage.__file__).parent / "data"
    summary = prepare("jsonl", tmp_path / "out", input=str(questions), images=images)
    assert summary["rows"] == 32 and summary["dropped"] == {}
    rows = load.load_rows(str(tmp_path / "out"))
    assert {image.mode for row in rows for image in row["images"]} == {"RGB"}


def test_a_hub_name_loads_through_datasets(tmp_path, monkeypatch):
    """`load_dataset` takes a folder where it takes a repository; everything after the download is the real thing."""
    write_hub_parquet(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet", [R1V, R1V])
    source = dataclasses.replace(sources.SOURCES["clevr-count"], hub=str(tmp_path / "repo"))
    monkeypatch.setitem(sources.SOURCES, "clevr-count", source)
    monkeypatch.setitem(sources.BY_HUB, source.hub, source)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    assert prepare("clevr-count", tmp_path / "out", limit=1)["rows"] == 1
    with pytest.raises(UsageError, match="no split 'test'"):
        prepare("clevr-count", tmp_path / "other", split="test")
    rows = load.load_rows(source.hub)
    assert rows["solution"] == ["3", "3"]
    assert load.columns(source.hub) == ["id", "images", "problem", "solution", "source"]


def test_an_unreachable_hub_is_an_error_with_a_way_out(tmp_path):
    code = (
        "from r1vfree_cli.data.prepare import prepare; from r1vfree_cli.core.errors import UsageError\n"
        f"try: prepare('geoqa', {str(tmp_path / 'out')!r})\nexcept UsageError as e: print(e.message, '|', e.hint)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert "leonardPKU/GEOQA_R1V_Train_8K" in out and "--input" in out and not (tmp_path / "out").exists()


# --- drops -----------------------------------------------------------------------------------------------------


def bad_records(folder: Path) -> tuple[list, dict[str, int]]:
    """Records with everything that can be wrong, and the counts that must come of them."""
    (folder / "good.png").write_bytes(picture(0))
    (folder / "cmyk.jpg").write_bytes(picture(0, mode="CMYK", kind="JPEG"))
    (folder / "tiny.png").write_bytes(picture(0, size=(1, 1)))
    (folder / "half.jpg").write_bytes(picture(0, size=(90, 90), kind="JPEG")[:1500])
    (folder / "text.png").write_bytes(b"no image")
    (folder.parent / "outside.png").write_bytes(picture(0))
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    good = {"image": "good.png", "problem": "What?"}
    records = [
        good | {"id": "a"},
        good | {"image": ["good.png", "cmyk.jpg"]},
        "",
        good | {"id": "a"},
        good | {"id": [1.5]},
        good | {"problem": ""},
        good | {"problem": 3},
        good | {"solution": {"a": 1}},
        {"image": "good.png"},
        {"problem": "What?"},
        good | {"image": "tiny.png"},
        good | {"image": "half.jpg"},
        good | {"image": "text.png"},
        good | {"image": "none.png"},
        good | {"image": "link.png"},
        good | {"image": "../outside.png"},
        good | {"image": str(folder.parent / "outside.png")},
        good | {"image": "http://localhost:1/a.png"},
        good | {"image": {"width": 3}},
        '{"half": ',
        "[1, 2]",
        '{"problem": "half \\ud800", "image": "good.png"}',
    ]
    counts = {
        "duplicate id": 1,
        "id is neither a string nor a number": 1,
        "empty question": 1,
        "question is not a string": 1,
        "question missing": 1,
        "solution is neither text nor a number": 1,
        "no image": 1,
        "image side under 28 px": 1,
        "truncated or corrupt image": 1,
        "not an image": 1,
        "missing image": 1,
        "image path leaves the root": 3,
        "image is a URL": 1,
        "image is neither bytes nor a path": 1,
        "line is not JSON": 1,
        "record is not an object": 1,
        "text is not valid Unicode": 1,
    }
    return records, counts


def test_everything_wrong_is_dropped_counted_and_located(tmp_path):
    (tmp_path / "in").mkdir()
    records, counts = bad_records(tmp_path / "in")
    source = write_lines(tmp_path / "in" / "bad.jsonl", records)
    summary = prepare("jsonl", tmp_path / "out", input=str(source))
    assert summary["rows"] == 2 and summary["dropped"] == counts
    assert summary["read"] == 2 + sum(counts.values())
    assert summary["dropped_places"]["duplicate id"] == ["bad.jsonl:4"]
    assert summary == json.loads((tmp_path / "out" / "data.json").read_text())
    assert [len(r["images"]) for r in rows_of(tmp_path / "out")] == [1, 2]


def test_when_nothing_is_left_the_error_has_the_counts_and_nothing_is_written(tmp_path):
    source = write_lines(tmp_path / "q.jsonl", [{"text": "a"}, {"text": "b"}, "x"])
    with pytest.raises(DataError) as caught:
        prepare("jsonl", tmp_path / "out", input=str(source))
    assert caught.value.exit_code == 3
    assert caught.value.details[0] == "2 x question missing (q.jsonl:1, q.jsonl:2)"
    assert "columns of the first record: text" in caught.value.details
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]


def test_forgotten_images_folder_is_hinted_at(tmp_path):
    source = write_lines(tmp_path / "q.jsonl", [{"image": "a.png", "problem": "What?"}])
    with pytest.raises(DataError) as caught:
        prepare("jsonl", tmp_path / "out", input=str(source))
    assert "--images" in caught.value.hint


def test_images_read_from_a_folder_nothing_wrote_to(tmp_path):
    """Rows carry their images: once prepared, the folder they came from is not needed again."""
    questions = photos(tmp_path / "in", 4)
    prepare("jsonl", tmp_path / "out", input=str(questions))
    shutil.rmtree(tmp_path / "in")
    rows = load.load_rows(str(tmp_path / "out"))
    for i, row in enumerate(rows):
        assert np.array_equal(np.asarray(row["images"][0]), pixels(picture(i)))


def test_text_that_is_no_utf8_costs_its_own_record_only(tmp_path):
    problems = pa.array([b"What?", b"\xff\xfe", b"Why?"]).cast(pa.string(), safe=False)
    image = pa.array([PIC] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"problem": problems, "image": image}), tmp_path / "x.parquet")
    summary = prepare("parquet", tmp_path / "out", input=str(tmp_path / "x.parquet"))
    assert summary["dropped"] == {"record cannot be decoded": 1}
    assert summary["dropped_places"] == {"record cannot be decoded": ["x.parquet:2"]}
    assert [r["problem"] for r in rows_of(tmp_path / "out")] == ["What?", "Why?"]


def test_records_without_id_are_numbered_through_all_files(tmp_path):
    for part in range(3):
        write_hub_parquet(tmp_path / "in" / f"train-0000{part}-of-00003.parquet", [R1V] * 4)
    prepare("clevr-count", tmp_path / "out", input=str(tmp_path / "in"))
    assert [r["id"] for r in rows_of(tmp_path / "out")] == [f"clevr-count-{i:07d}" for i in range(12)]


# --- limit, seed, the same bytes -------------------------------------------------------------------------------


def test_same_input_seed_and_limit_give_the_same_bytes(tmp_path):
    source = str(photos(tmp_path / "in", 20))
    runs = [prepare("jsonl", tmp_path / f"o{i}", input=source, limit=8, seed=3) for i in range(2)]
    assert runs[0] == runs[1]
    files = [(tmp_path / f"o{i}" / "train-00000.parquet").read_bytes() for i in range(2)]
    assert files[0] == files[1]
    assert hashlib.sha256(files[0]).hexdigest() == runs[0]["splits"]["train"]["files"][0]["sha256"]
    assert load.data_sha256(str(tmp_path / "o0")) == runs[0]["splits"]["train"]["sha256"]
    chosen = [r["id"] for r in rows_of(tmp_path / "o0")]
    assert chosen == sorted(chosen, key=lambda i: int(i[1:])) and chosen != [f"q{i}" for i in range(8)]
    other = prepare("jsonl", tmp_path / "o2", input=source, limit=8, seed=4)
    assert other["sha256"] != runs[0]["sha256"]
    whole = [prepare("jsonl", tmp_path / f"w{s}", input=source, seed=s)["sha256"] for s in (0, 1)]
    assert whole[0] == whole[1]


def test_a_dropped_record_does_not_cost_a_row_of_the_limit(tmp_path):
    source = photos(tmp_path / "in", 40)
    for i in range(0, 40, 2):
        (tmp_path / "in" / "img" / f"{i}.png").write_bytes(b"broken")
    summary = prepare("jsonl", tmp_path / "out", input=str(source), limit=15, seed=1)
    assert summary["rows"] == 15 and summary["read"] == 15 + summary["dropped"]["not an image"]
    assert prepare("jsonl", tmp_path / "all", input=str(source), limit=30)["rows"] == 20


def test_limit_of_a_parquet_file_keeps_images_with_their_questions(tmp_path):
    records = [{"id": str(i), "image": {"bytes": picture(i), "path": None}, "problem": str(i)} for i in range(50)]
    write_hub_parquet(tmp_path / "a" / "train-00000-of-00002.parquet", records[:30])
    write_hub_parquet(tmp_path / "a" / "train-00001-of-00002.parquet", records[30:])
    prepare("parquet", tmp_path / "out", input=str(tmp_path / "a"), limit=20, seed=5)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 20 and any(int(r["id"]) >= 30 for r in rows)
    for row in rows:
        assert row["problem"] == row["id"]
        assert row["images"][0]["bytes"] == picture(int(row["id"]))


# --- whole or not at all ---------------------------------------------------------------------------------------


def test_an_output_folder_in_use_is_refused_with_the_ways_out(tmp_path):
    source = str(photos(tmp_path / "in", 2))
    first = prepare("jsonl", tmp_path / "out", input=source)
    with pytest.raises(UsageError) as caught:
        prepare("jsonl", tmp_path / "out", input=source)
    assert caught.value.exit_code == 2 and "--overwrite" in caught.value.hint and "--out" in caught.value.hint
    assert prepare("jsonl", tmp_path / "out", input=source, limit=1, overwrite=True)["rows"] == 1
    assert load.load_rows(str(tmp_path / "out")).num_rows == 1
    assert prepare("jsonl", tmp_path / "out", input=source, overwrite=True) == first
    assert load.load_rows(str(tmp_path / "out")).num_rows == 2  # and not what a cache remembers
    (tmp_path / "empty").mkdir()
    assert prepare("jsonl", tmp_path / "empty", input=source) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "empty", "in", "out"]


def test_overwrite_never_deletes_what_is_not_prepared_data_nor_the_input(tmp_path):
    source = photos(tmp_path / "in", 2)
    with pytest.raises(UsageError, match="something else"):
        prepare("jsonl", tmp_path / "in", input=str(source), overwrite=True)
    prepare("jsonl", tmp_path / "out", input=str(source))
    with pytest.raises(UsageError, match="holds the input"):
        prepare("parquet", tmp_path / "out", input=str(tmp_path / "out" / "train-00000.parquet"), overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        prepare("jsonl", tmp_path / "file", input=str(source), overwrite=True)
    assert source.is_file() and len(rows_of(tmp_path / "out")) == 2


def test_a_failed_run_leaves_nothing_and_keeps_what_was_there(tmp_path):
    source = photos(tmp_path / "in", 3)
    before = prepare("jsonl", tmp_path / "out", input=str(source))
    parquet = tmp_path / "x.parquet"
    write_hub_parquet(parquet, [{"id": str(i), **R1V} for i in range(40)])
    whole = parquet.read_bytes()
    for broken in (whole[: len(whole) // 2], b"PAR1" + whole[4:-200] + b"x" * 196 + whole[-4:], b""):
        parquet.write_bytes(broken)
        with pytest.raises(DataError, match=r"x\.parquet"):
            prepare("parquet", tmp_path / "out", input=str(parquet), overwrite=True)
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == before
    assert leftovers(tmp_path) == []


def test_sigkill_leaves_only_a_work_folder_which_the_next_run_removes(tmp_path):
    source = photos(tmp_path / "in", 400)
    code = f"from r1vfree_cli.data.prepare import prepare; prepare('jsonl', {str(tmp_path / 'out')!r}, input={str(source)!r})"
    slow = "import r1vfree_cli.data.prepare as p, time; old = p.make_row\n"
    slow += "p.GROUP_ROWS = 5\ndef make_row(*a, **k):\n    time.sleep(0.02)\n    return old(*a, **k)\np.make_row = make_row\n"
    worker = subprocess.Popen([sys.executable, "-c", slow + code])
    until = time.monotonic() + 20
    while not any(f.stat().st_size for d in leftovers(tmp_path) for f in (tmp_path / d).glob("*.parquet")):
        assert time.monotonic() < until and worker.poll() is None
        time.sleep(0.02)
    alive = leftovers(tmp_path)
    with pytest.raises(UsageError, match=rf"\(pid {worker.pid}\) is using the data folder") as caught:
        prepare("jsonl", tmp_path / "out", input=str(source), limit=2)  # beside a living run
    assert caught.value.exit_code == 2 and worker.poll() is None
    prepare("jsonl", tmp_path / "out.2", input=str(source), limit=2)  # a neighbour
    assert leftovers(tmp_path) == alive and len(alive) == 1
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert leftovers(tmp_path) == alive
    prepare("jsonl", tmp_path / "out", input=str(source), limit=3)
    assert len(rows_of(tmp_path / "out")) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "out.2"]


@pytest.mark.skipif(not machine.mounts(), reason="no small file system can be mounted here")
def test_a_disk_that_fills_up_leaves_what_was_there_and_nothing_else(tmp_path):
    """At every size of the disk: prepared anew to the end, or exit 2, the rows of before and room again."""
    photos(tmp_path / "in", 60)
    code = """import os, sys
from tests.fuzz import machine
from r1vfree_cli import cli
os.chdir(sys.argv[1])
machine._mount("disk", f"size={sys.argv[2]}k")
def prepare(*more):
    sys.argv = ["r1v", "prepare-data", "files", "--input", "in", "--out", "disk/out", "--json", *more]
    try:
        cli.main()
    except SystemExit as e:
        return e.code
    return 0
assert prepare("--limit", "3") == 0
before = {p: open(p, "rb").read() for p in os.popen("find disk -type f").read().split()}
failed = prepare("--overwrite")
after = {p: open(p, "rb").read() for p in os.popen("find disk -type f").read().split()}
assert failed in (0, 2) and (not failed or before == after), (failed, before.keys(), after.keys())
assert all(".lock" not in p and ".staging" not in p for p in after), after.keys()
assert prepare("--overwrite", "--limit", "2") == 0
print("full" if failed else "fits", file=sys.stderr)
"""
    ends = []
    for size in (120, 1000):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(size)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ends.append(done.stderr.split()[-1])
        assert ends[-1] == "fits" or "no space left on" in done.stderr.lower()
        (tmp_path / "disk").rmdir()
    assert ends == ["full", "fits"]


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path):
    source = str(photos(tmp_path / "in", 1))
    for out in (tmp_path / "in" / "questions.jsonl" / "out", Path("/proc/none/out")):
        with pytest.raises(UsageError, match="cannot"):
            prepare("jsonl", out, input=source)


def test_impossible_arguments(tmp_path):
    source = str(photos(tmp_path / "in", 1))
    for arguments, word in (
        ({"source": "clevr-cuont"}, "did you mean clevr-count"),
        ({"source": "jsonl"}, "--input"),
        ({"source": "jsonl", "input": str(tmp_path / "none")}, "no such --input"),
        ({"source": "jsonl", "input": source, "images": tmp_path / "none"}, "no image folder"),
        ({"source": "jsonl", "input": source, "split": "test"}, "it has train"),
        ({"source": "jsonl", "input": source, "limit": 0}, "at least 1"),
        ({"source": "jsonl", "input": str(tmp_path / "in" / "img" / "0.png")}, "cannot read"),
        ({"source": "shapes", "input": source}, "drawn"),
        ({"source": "shapes", "split": "nope"}, "it has train, sft, judge, test"),
    ):
        with pytest.raises(UsageError) as caught:
            prepare(out=tmp_path / "out", **arguments)
        assert word in f"{caught.value.message} {caught.value.hint}"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError):
        prepare("jsonl", tmp_path / "out", input=str(tmp_path / "nothing"))


# --- memory ----------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """100 MB of images may cost a few row groups more than 10 MB of them."""
    (tmp_path / "in").mkdir()
    for i in range(8):
        padding = np.random.default_rng(i).bytes(60_000)
        (tmp_path / "in" / f"{i}.jpg").write_bytes(picture(i, size=(200, 180), kind="JPEG") + padding)
    peaks = {}
    for rows in (120, 1200):
        records = [{"id": str(i), "image": f"{i % 8}.jpg", "problem": "What?"} for i in range(rows)]
        source = write_lines(tmp_path / "in" / f"{rows}.jsonl", records)
        code = (
            "import resource, r1vfree_cli.data.prepare as p; p.GROUP_BYTES = 2**22; p.SHARD_BYTES = 2**25\n"
            f"s = p.prepare('jsonl', {str(tmp_path / str(rows))!r}, input={str(source)!r})\n"
            "print(s['rows'], len(s['splits']['train']['files']), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert int(out[0]) == rows
        peaks[rows] = int(out[2]) / 1024
    assert int(out[1]) >= 3  # several shards
    assert sum(f.stat().st_size for f in (tmp_path / "1200").glob("*.parquet")) > 90 * 2**20
    assert peaks[1200] - peaks[120] < 40, peaks


# --- loading ---------------------------------------------------------------------------------------------------


def test_shapes_are_drawn_once_into_the_cache(tmp_path):
    assert load.find_rows("shapes?n=12", "test") is None
    first = load.ensure_rows("shapes?n=12", "test")
    assert load.find_rows("shapes?n=12", "test") == first
    stamp = (first / "data.json").stat().st_mtime_ns
    assert load.ensure_rows("shapes?n=12", "test") == first
    assert (first / "data.json").stat().st_mtime_ns == stamp and first.is_relative_to(tmp_path / "cache")
    shas = {load.data_sha256(f"shapes?{query}", "test") for query in ("n=12", "seed=0&n=12", "seed=1&n=12", "n=13")}
    assert len(shas) == 3
    assert len(load.load_rows("shapes?n=12", "test")) == 12
    assert load.load_rows("shapes?n=12", "test", limit=5)["id"] == load.load_rows("shapes?n=12", "test")["id"][:5]
    for bad in ("shapes?n=x", "shapes?m=3", "shapes?n=1&n"):
        with pytest.raises(UsageError, match="seed=INT"):
            load.ensure_rows(bad, "test")
    with pytest.raises(UsageError, match="no split"):
        load.ensure_rows("shapes", "dev")


def test_a_damaged_cache_is_drawn_again():
    folder = load.ensure_rows("shapes?n=8", "test")
    before = load.data_sha256("shapes?n=8", "test")
    (folder / "test-00000.parquet").write_bytes(b"short")
    assert load.load_rows("shapes?n=8", "test").num_rows == 8
    assert load.data_sha256("shapes?n=8", "test") == before


def test_many_processes_ask_at_once_and_one_prepares(tmp_path):
    code = (
        "import r1vfree_cli.data.load as l; old = l.prepare\n"
        "def prepare(**k):\n    print('prepared'); return old(**k)\n"
        "l.prepare = prepare; print(l.ensure_rows('shapes?n=40', 'train').name[:6])"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for _ in range(4)
    ]
    said = [worker.communicate()[0].split() for worker in workers]
    assert sorted(said) == [["prepared", "shapes"]] + [["shapes"]] * 3


def test_bare_parquet_files_with_the_rows_columns(tmp_path):
    prepare("shapes", tmp_path / "out", split="test", limit=6)
    (tmp_path / "bare").mkdir()
    table = pq.read_table(tmp_path / "out" / "test-00000.parquet").drop(["thinking", "source"])
    table = table.replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "bare" / "test.parquet")
    for path in (tmp_path / "bare", tmp_path / "bare" / "test.parquet"):
        rows = load.load_rows(str(path), "test")
        assert rows.column_names == list(load.COLUMNS)
        assert rows[0]["images"][0].size == (56, 56) and rows[0]["thinking"] is None
        assert load.columns(str(path), "test") == ["id", "images", "problem", "solution", "source"]
    sha = load.data_sha256(str(tmp_path / "bare"), "test")
    pq.write_table(table.slice(0, 5), tmp_path / "bare" / "test.parquet")
    assert load.data_sha256(str(tmp_path / "bare"), "test") != sha


def test_a_column_that_is_null_in_every_row_does_not_count(tmp_path):
    prepare("jsonl", tmp_path / "out", input=str(photos(tmp_path / "in", 3)))
    assert load.columns(str(tmp_path / "out")) == ["id", "images", "problem", "source"]


def test_images_that_are_paths_or_urls_are_not_opened_at_loading(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(0))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for value, kind, reason in (
        ([[{"bytes": None, "path": str(secret)}]], pa.list_(image), "image bytes are needed"),
        ([[{"bytes": None, "path": "http://localhost:1/a.png"}]], pa.list_(image), "image is a URL"),
        ([[str(secret)]], pa.list_(pa.string()), "image bytes are needed"),
        ([[b"x", None]], pa.list_(pa.binary()), "not an image"),
        ([str(secret)], pa.string(), "image bytes are needed"),
    ):
        table = pa.table({"id": ["a"], "problem": ["What?"], "images": pa.array(value, kind)})
        pq.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(DataError, match="none of 1 records") as caught:
            load.load_rows(str(tmp_path / "x.parquet"))
        assert reason in caught.value.details[0]


def test_what_holds_no_rows_is_refused(tmp_path):
    prepare("shapes", tmp_path / "good", split="test", limit=3)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    (copy("missing") / "test-00000.parquet").unlink()
    with open(copy("longer") / "test-00000.parquet", "ab") as f:
        f.write(b"x")
    (copy("json") / "data.json").write_text("[")
    (copy("schema") / "data.json").write_text('{"schema_version": 99, "splits": {}}')
    summary = json.loads((tmp_path / "good" / "data.json").read_text())
    summary["splits"]["test"]["files"][0]["name"] = "../good/test-00000.parquet"
    (copy("escape") / "data.json").write_text(json.dumps(summary))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "columns.parquet")
    for name, word in (
        ("missing", "is missing"),
        ("longer", "changed"),
        ("json", "data.json"),
        ("schema", "99"),
        ("escape", "missing"),
        ("nothing", "no rows"),
        ("text.parquet", "text.parquet"),
        ("columns.parquet", "none of 1 records can be used"),
    ):
        with pytest.raises(DataError, match=word) as caught:
            load.ensure_rows(str(tmp_path / name), "train" if name == "columns.parquet" else "test")
        assert caught.value.exit_code == 3
    assert "columns of the first record: image" in caught.value.details
    with pytest.raises(DataError, match="it has test"):
        load.ensure_rows(str(tmp_path / "good"), "train")


def test_a_path_that_does_not_exist_names_what_is_near(tmp_path):
    for path, hint in (
        ("leonardPKU/clevr_cogen_train", "leonardPKU/clevr_cogen_a_train"),
        ("geoqa", "leonardPKU/GEOQA_R1V_Train_8K"),
        (str(tmp_path / "none"), "prepare-data"),
        ("~nobody\0/x", "prepare-data"),
        ("x" * 5000, "prepare-data"),
    ):
        with pytest.raises(UsageError) as caught:
            load.ensure_rows(path)
        assert hint in caught.value.hint


def test_columns_of_a_hub_source_are_known_without_the_hub():
    assert "thinking" in load.columns("MMInstruction/Clevr_CoGenT_TrainA_R1")
    assert "thinking" not in load.columns("Exgc/R1V-Free_RLHFV")
    assert "solution" in load.columns("shapes?seed=3")


def test_a_schedulers_signal_ends_the_command_as_ctrl_c_does(tmp_path):
    argv = ["prepare-data", "shapes", "--out", str(tmp_path / "out"), "--limit", "50000"]
    r1v = subprocess.Popen([sys.executable, "-c", "from r1vfree_cli.cli import main; main()", *argv])
    while not leftovers(tmp_path) and r1v.poll() is None:
        time.sleep(0.02)
    r1v.terminate()
    assert r1v.wait(30) == 130 and list(tmp_path.iterdir()) == []
