"""What a run leaves and reads again, damaged: run dirs, checkpoints, models; and what judges reply."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

from hypothesis import strategies as st

from . import values
from .harness import Case, Link
from .recipes import GRPO, dumped

# --- run dirs --------------------------------------------------------------------------------------------------

REPORT = ["report", "run", "--out", "out", "--json"]
GO_ON = ["grpo", "--recipe", "r.yaml", "--run-dir", "run"]


def _run_dir(base: Path, name: str, content: bytes | Link, argv: list[str]) -> Case:
    files: dict[str, bytes | Link] = {f"run/{name}": content, "r.yaml": dumped(GRPO)}
    # An attempt is counted, and its end written down, in the run's own files.
    keeps = ("run/status.json", "run/recipe.yaml", "run/logs", "run/attempt") if "--resume" in argv else ()
    case = Case(f"{argv[0]} of a run dir with {name}", argv, files, base, names=("run", "out"), keeps=keeps)
    case.out = "out" if argv is REPORT else None
    return case


def _overwritten(base: Path) -> list[Case]:
    """A finished run is never replaced unasked."""
    return [
        Case("a run is there", GO_ON, {"r.yaml": dumped(GRPO)}, base, names=("--resume",), codes=(2,)),
        Case("another recipe's run", [*GO_ON, "--resume"], {"r.yaml": dumped(GRPO)}, base, names=("run",), keeps=("run/",)),
        Case("a folder of mine", [*GO_ON, "--overwrite"], {"r.yaml": dumped(GRPO), "run/x": b"mine"}, names=("run",), codes=(2,)),
        Case("a file of mine", GO_ON, {"r.yaml": dumped(GRPO), "run": b"mine"}, names=("run",), codes=(2,)),
        Case("a report over my files", REPORT, {"out/report.md": b"mine"}, base, names=("out",), codes=(2,)),
        Case("a report of nothing", ["report", "nothing", "--out", "out"], names=("nothing",), codes=(3,), out="out"),
        Case("a report of a file", ["report", "f", "--out", "out"], {"f": b""}, names=("f",), codes=(3,), out="out"),
    ]  # fmt: skip


# --- checkpoints -----------------------------------------------------------------------------------------------


class _Payload:
    """A pickle that writes a file when it is loaded."""

    def __reduce__(self):
        return (Path("loaded-a-pickle").write_text, ("x",))


PICKLE = pickle.dumps(_Payload())


def _load() -> None:
    """The processor and the policy, as a training worker loads them."""
    from r1vfree_cli.config.schema import Model
    from r1vfree_cli.models.load import load_policy, load_processor

    model = Model(name="ckpt", dtype="float32")
    load_processor(model)
    load_policy(model)


def _resume_point() -> None:
    from r1vfree_cli.run.checkpoint import checkpoints, lacking
    from r1vfree_cli.run.run_dir import RunDir

    for _, path in checkpoints(RunDir("run").checkpoints):
        lacking(path)


def _checkpoint(base: Path, name: str, content: bytes | Link, load: bool = False) -> Case:
    files: dict[str, bytes | Link] = {f"ckpt/{name}": content}
    if load:
        return Case(f"load with {name}", [], files, base, names=("ckpt",), call=_load)
    return Case(f"merge with {name}", ["merge", "ckpt", "--out", "out", "--json"], files, base, out="out", names=("ckpt",))  # fmt: skip


def _pickles(base: Path) -> list[Case]:
    """Weights that are pickles are refused, and never loaded."""
    config = (base / "ckpt" / "config.json").read_bytes()
    shards = {"ckpt/config.json": config, "ckpt/latest": b"global_step1"}
    merge = ["merge", "ckpt", "--out", "out", "--json"]
    only: list[dict[str, bytes | Link]] = [
        {"ckpt/config.json": config, "ckpt/pytorch_model.bin": PICKLE},
        {"ckpt/adapter_config.json": b'{"peft_type": "LORA"}', "ckpt/adapter_model.bin": PICKLE},
        shards | {"ckpt/global_step1/mp_rank_00_model_states.pt": PICKLE},
        shards | {"ckpt/latest": b"../../x"},
        shards | {"ckpt/latest": b"\xff\xfe"},
        {"ckpt/x": b""},
    ]
    return [Case("no weights", merge, files, out="out", names=("ckpt",), codes=(2, 3)) for files in only]


# --- judges ----------------------------------------------------------------------------------------------------


def _chat(content) -> dict:
    message = {"role": "assistant", "content": content}
    return {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}  # fmt: skip


CLASSIFIED = {"data": [{"index": 0, "label": "Yes", "probs": [0.25], "num_classes": 1}], "usage": {"prompt_tokens": 3}}


def _reply(kind: str, body: bytes) -> Case:
    """A verdict is a finite number; whatever is no verdict is a failure of that call, and nothing else."""

    def call() -> None:
        from r1vfree_cli.config.rewards import FeedbackReward
        from r1vfree_cli.core.errors import UsageError
        from r1vfree_cli.eval.reading import judged_text, read_yes_no
        from r1vfree_cli.judges.chat import ChatJudge, stated_label
        from r1vfree_cli.judges.classify import ClassifyJudge
        from r1vfree_cli.judges.client import Endpoint
        from r1vfree_cli.judges.protocol import Failure, Question

        async def exchange(*_):
            return 200, {}, body

        if kind == "hallusion":
            endpoint = Endpoint("http://127.0.0.1:9", "m", max_retries=0)
            endpoint._exchange = exchange  # type: ignore[method-assign]
            try:
                text = asyncio.run(endpoint.chat([], 8, 0)).text
            except (Failure, UsageError):
                return
            text.encode()
            assert stated_label(text, {"correct": 1, "incorrect": 0}) in (1, 0, None)
            assert read_yes_no(judged_text(text, "answer") or "") in ("yes", "no", None)
            return
        settings = {
            "name": "feedback",
            "backend": kind,
            "base_url": "http://127.0.0.1:9",
            "model": "m",
            "max_retries": 0,
        }
        judge = {"chat": ChatJudge, "classify": ClassifyJudge}[kind](
            FeedbackReward.model_validate(settings), "", lambda: False
        )
        judge.endpoint._exchange = exchange  # type: ignore[method-assign]
        try:
            verdict = asyncio.run(judge.ask(Question((), "What colour?", "red")))
        except (Failure, UsageError) as failure:
            str(failure).encode("utf-8", "replace")
            return
        assert abs(verdict.score) <= 1e4 and (kind == "classify" or 0 <= verdict.score <= 1)

    return Case(f"a reply to {kind}: {body[:80]!r}", call=call, codes=(0,))


VERDICTS = ('{"score": 1}', '{"score": 0.5, "why": "x"}', '{"score": NaN}', '{"score": 1e999}', '{"score": -0.1}', '{"score": true}', '{"score": "1"}', '{"score": null}',
            "[1]", "1", "yes", "", " ", "```json\n{}\n```", '{"score": 1}{"score": 0}', "[" * 50_000, '{"score": ' + "9" * 5000 + "}", "\ud800", "correct", "The answer is not correct",
            "<think>correct", "<answer>" * 999, "\x00", "yes no yes")  # fmt: skip
_contents = st.one_of(st.sampled_from(VERDICTS), values.values, st.text(max_size=20))
replies = st.one_of(
    st.builds(_reply, st.sampled_from(("chat", "hallusion")), _contents.map(_chat).map(values.as_json)),
    st.builds(_reply, st.sampled_from(("chat", "hallusion")), values.document_files(_chat('{"score": 0.5}'))),
    st.builds(_reply, st.just("classify"), values.document_files(CLASSIFIED)),
)
REPLIES = [_reply(kind, values.as_json(_chat(text))) for text in VERDICTS for kind in ("chat", "hallusion")]

# --- all of it -------------------------------------------------------------------------------------------------


def _damaged(base: Path, inside: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """(file, other content) for the files of a folder: JSON with other values, anything with other bytes."""
    files = {str(p.relative_to(base / inside)): p for p in sorted((base / inside).rglob("*")) if p.is_file()}

    def content(name: str) -> st.SearchStrategy[bytes]:
        data = files[name].read_bytes()
        if name.endswith(".json") and len(data) < 20_000:
            return values.document_files(json.loads(data))
        return values.damaged(data)

    return st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), content(name)))


def make(pieces: Path) -> SimpleNamespace:
    """Hand-made cases and strategies around a real run dir, a real tiny model and a LoRA adapter of it."""
    from peft import LoraConfig, get_peft_model

    from tests.integration.report_dirs import make_run
    from tests.integration.tiny_models import load_tiny, save_tiny

    run, whole, lora = pieces / "a", pieces / "b", pieces / "c"
    make_run(run / "run", steps=20, plain=True)
    for step in (5, 10):
        folder = run / "run" / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "trainer_state.json", "optimizer.pt"):
            (folder / name).write_bytes(b"{}")
    save_tiny(whole / "ckpt")
    both = pieces / "d"
    shutil.copytree(run, both)
    shutil.copytree(whole, both, dirs_exist_ok=True)
    (whole / "ckpt" / "r1v.json").write_text('{"schema": 1, "base_model": "x", "data": {"path": "y"}}')
    save_tiny(lora / "base")
    adapter = get_peft_model(load_tiny(lora / "base")[0], LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(lora / "ckpt")
    settings = json.loads((lora / "ckpt" / "adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
    (lora / "ckpt" / "adapter_config.json").write_text(json.dumps(settings))

    commands = st.sampled_from((REPORT, REPORT, [*GO_ON, "--resume"], GO_ON))
    kinds = st.sampled_from(((whole, False), (whole, True), (lora, False)))
    settings = json.loads((whole / "ckpt" / "tokenizer_config.json").read_text()) | {"model_max_length": [1]}
    tokenizer = json.dumps(settings).encode()
    rubbish = (b"", b"null", b"[]", b"\x00", b"\xff\xfe", values.deep_json(), Link("/etc/hostname"), Link("x"))
    names = ("recipe.yaml", "status.json", "launch.json", "metrics.jsonl", "summary.json", "final/r1v.json", "rollouts/step-00000001.parquet")  # fmt: skip
    models = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors", "r1v.json")  # fmt: skip
    return SimpleNamespace(
        run_and_model=both,
        run_dirs=[
            *_overwritten(run),
            *(_run_dir(run, n, c, a) for n in names for c in rubbish for a in (REPORT, [*GO_ON, "--resume"])),
            Case("complete checkpoints", [], base=run, call=_resume_point),
        ],
        checkpoints=[
            *_pickles(whole),
            *(
                _checkpoint(whole, "chat_template.jinja", t, load)
                for t in (b"", b"{%", b"no image", b"{{ x.y.z }}")
                for load in (False, True)
            ),
            *(_checkpoint(whole, "tokenizer_config.json", tokenizer, load) for load in (False, True)),
            *(_checkpoint(whole, n, c, load) for n in models for c in rubbish[:6] for load in (False, True)),
            *(_checkpoint(lora, n, c) for n in ("adapter_config.json", "adapter_model.safetensors") for c in rubbish),
        ],
        some_run_dirs=st.builds(lambda f, argv: _run_dir(run, *f, argv), _damaged(run, "run"), commands),
        some_checkpoints=kinds.flatmap(
            lambda k: _damaged(k[0], "ckpt").map(lambda f: _checkpoint(k[0], *f, load=k[1]))
        ),
    )
