"""Recipes and overrides: YAML that is wrong in value, shape or text."""

from __future__ import annotations

import yaml
from hypothesis import strategies as st

from r1vfree_cli.config.recipes import recipes_root

from . import values
from .harness import Case, Link

GRPO = {
    "model": {"name": "embedded:tiny-policy", "dtype": "float32", "min_pixels": 3136, "max_pixels": 3136, "lora": None},
    "data": {"path": "shapes", "split": "train", "heldout": {"path": "shapes", "split": "test"}},
    "rewards": [
        {"name": "format", "weight": 0.2},
        {
            "name": "feedback",
            "backend": "chat",
            "base_url": "http://127.0.0.1:9/v1",
            "model": "judge",
            "price": {"input": 1, "output": 2},
            "max_cost": 3,
            "request": {"temperature": 0},
            "canaries": {"samples": 2},
        },
    ],
    "train": {
        "num_generations": 4,
        "prompts_per_device": 2,
        "learning_rate": 1e-6,
        "max_steps": 5,
        "beta": 0.0,
        "generation_batch_size": 8,
        "report_to": "none",
        "seed": 0,
        "guard": {"patience": 3},
        "chat_template_kwargs": None,
    },
    "launch": {"preset": "cpu", "processes": 1, "nodes": 1, "devices": None},
}
SFT = {k: v for k, v in GRPO.items() if k != "rewards"} | {"train": {"max_steps": 5, "learning_rate": 1e-5, "seed": 0}}
TEXT = (recipes_root() / "grpo" / "tiny.yaml").read_bytes()
COMMANDS = (
    ["recipes", "validate", "r.yaml", "--stage", "grpo", "--json"],
    ["recipes", "show", "r.yaml", "--stage", "grpo", "--json"],
    ["recipes", "show", "r.yaml", "--stage", "grpo"],
    ["grpo", "--recipe", "r.yaml", "--dry-run", "--json"],
)


def dumped(document) -> bytes:
    """YAML of a document; what YAML cannot hold is written as Python shows it."""
    try:
        return yaml.safe_dump(document, sort_keys=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return repr(document).encode("utf-8", "surrogatepass")


def _case(name: str, text: bytes, argv: list[str]) -> Case:
    return Case(name, argv, {"r.yaml": text}, names=("r.yaml",))


files = st.one_of(
    st.sampled_from([GRPO, SFT]).flatmap(lambda d: values.changed(d, 3)).map(dumped),
    values.changed(GRPO).map(dumped),
    values.damaged(TEXT),
    values.damaged(dumped(GRPO)),
    values.document_files(GRPO),
)
cases = st.builds(_case, st.just("a bad recipe"), files, st.sampled_from(COMMANDS))

_KEYS = [".".join(map(str, p)) for p in values.places(GRPO) if p]
_VALUES = ("1e-6", "true", "{}", "[]", "[1, 2", "{a: b}", "null", "~", "''", "&a [*a]", "*a", "!!python/name:os.system", "1_000", "0x10", "010",
           "2020-01-01", "!!binary aGk=", "!!set {a}", ".nan", ".inf", "-.inf", "9" * 4400, "<<: {a: 1}", "? a", "\x00", "a: b: c")  # fmt: skip
overrides = st.builds(
    lambda argv, sets: Case(
        "a bad override",
        [*argv, *(f"--set={s}" for s in sets)],
        {"r.yaml": dumped(GRPO)},
        names=("r.yaml", "--set", "launch", "recipe"),
    ),
    st.sampled_from(COMMANDS),
    st.lists(
        st.one_of(
            st.builds(
                lambda k, v: f"{k}={v}",
                st.one_of(
                    st.sampled_from(_KEYS),
                    st.sampled_from(_KEYS)
                    .flatmap(lambda k: values.damaged(k.encode()))
                    .map(lambda b: b.decode("utf-8", "replace")),
                ),
                st.one_of(st.sampled_from(_VALUES), values.scalars.map(str)),
            ),
            st.text(max_size=20),
            st.sampled_from(
                [
                    "=",
                    "a=",
                    ".=1",
                    "train.=1",
                    "..a=1",
                    "rewards.²=1",
                    "rewards.9=1",
                    "rewards.feedback.price.input.x=1",
                    "a.b.c.d=1",
                ]
            ),
        ).filter(lambda s: "\x00" not in s),  # no process gets one
        min_size=1,
        max_size=3,
    ),
)


def _with(text: str) -> bytes:
    return dumped({k: v for k, v in GRPO.items() if k != "train"}) + text.encode()


TEXTS = {
    "empty": b"",
    "only a comment": b"# nothing\n",
    "a list": b"- 1\n- 2\n",
    "a byte order mark": b"\xef\xbb\xbf" + dumped(GRPO),
    "UTF-16": dumped(GRPO).decode().encode("utf-16"),
    "NUL": b"model: \x00\n",
    "no UTF-8": b"model: \xff\xfe\n",
    "tabs": b"model:\n\tname: x\n",
    "two documents": dumped(GRPO) + b"---\n" + dumped(GRPO),
    "a key twice": dumped(GRPO) + b"model: {}\n",
    "a number as a key": b"1: 2\n",
    "a list as a key": b"? [a]\n: 2\n",
    "a recursive key": b"? &a [*a]\n: 2\n",
    "a python object": b"model: !!python/object/apply:os.system [id]\n",
    "a custom tag": b"model: !env HOME\n",
    "a date": _with("train: {max_steps: 2020-01-01}\n"),
    "bytes": _with("train: {report_to: !!binary aGk=}\n"),
    "a set": _with("train: {chat_template_kwargs: !!set {a, b}}\n"),
    "a document that holds itself": _with("train: {chat_template_kwargs: &a {b: *a}}\n"),
    "a list that holds itself": b"train: &a [*a]\n",
    "a mapping that is all itself": b"&a\nmodel: *a\ndata: *a\ntrain: *a\nrewards: *a\n",
    "deep flow": b"model: " + b"[" * 20000 + b"]" * 20000,
    "deep blocks": b"".join(b" " * i + b"a:\n" for i in range(400)),
    "merge keys": b"base: &b {name: x}\nmodel:\n  <<: *b\n",
    "ten thousand keys": b"".join(b"k%d: 1\n" % i for i in range(10_000)),
    "a long line": b"model: {name: " + b"x" * 2_000_000 + b"}\n",
    "a long number": _with("train: {max_steps: " + "9" * 5000 + "}\n"),
    "an integer no float holds": _with("train: {learning_rate: 1" + "0" * 400 + "}\n"),
    "a weight no float holds": dumped(values.put(GRPO, ("rewards", 0, "weight"), values.HUGE)),
    "not a number": _with("train: {learning_rate: .nan}\n"),
    "infinity": _with("train: {learning_rate: .inf}\n"),
    "an infinite weight": dumped(values.put(GRPO, ("rewards", 0, "weight"), float("inf"))),
    "an unfinished quote": b'model: {name: "x\n',
    "a seed no shuffle takes": dumped(values.put(GRPO, ("train", "seed"), -1)),
    "a huge seed": dumped(values.put(GRPO, ("train", "seed"), 2**70)),
    "a path with NUL": dumped(values.put(GRPO, ("data", "path"), "a\x00b")),
    "a model with NUL": dumped(values.put(GRPO, ("model", "name"), "a\x00b")),
    "a path as long as no file's": dumped(values.put(GRPO, ("data", "path"), "x" * 5000)),
    "a model as long as no file's": dumped(values.put(GRPO, ("model", "name"), "x" * 5000)),
    "a home that is not there": dumped(values.put(GRPO, ("data", "path"), "~nobody-here/x")),
    "a model in a home that is not there": dumped(values.put(GRPO, ("model", "name"), "~nobody-here/x")),
    "half a surrogate": b'model: {name: "\\ud800"}\n' + dumped({k: v for k, v in GRPO.items() if k != "model"}),
    "half a surrogate in a key": b'"\\ud800": 1\n' + dumped(GRPO),
    "markup": b"'[/red]': '[bold]x[/]'\n" + dumped(GRPO),
    "escape sequences": b'"\\e[31m": 1\n' + dumped(GRPO),
    "many rewards": dumped(values.put(GRPO, ("rewards",), [{"name": "format"}] * 2000)),
    "processes of a galaxy": dumped(values.put(GRPO, ("launch", "processes"), 10**30)),
    "devices of a galaxy": dumped(values.put(GRPO, ("launch",), {"preset": "ddp", "devices": [10**30], "processes": 1})),
    "negative devices": dumped(values.put(GRPO, ("launch",), {"preset": "ddp", "devices": [-1], "processes": 1})),
}  # fmt: skip
HAND = [_case(f"recipe: {name}", text, argv) for name, text in TEXTS.items() for argv in (COMMANDS[1], COMMANDS[3])]
HAND += [
    Case("recipe: no such file", ["grpo", "--recipe", "nothing.yaml", "--dry-run"], names=("nothing.yaml",), codes=(2,)),
    Case("recipe: a name as long as no file's", ["grpo", "--recipe", "x" * 5000, "--dry-run"], names=("xxx",), codes=(2,)),
    Case("recipe: a folder", ["grpo", "--recipe", "d.yaml", "--dry-run"], {"d.yaml/x": b""}, names=("d.yaml",), codes=(2,)),
    Case("recipe: a link to itself", ["grpo", "--recipe", "l.yaml", "--dry-run"], {"l.yaml": Link("l.yaml")}, names=("l.yaml",), codes=(2,)),
    Case("recipe: an empty name", ["grpo", "--recipe", "", "--dry-run"], codes=(2,)),
    Case("recipe: only a slash", ["doctor", "--recipe", "/"], names=("/",), codes=(2,)),
    Case("recipe: a picture", ["recipes", "show", "r.yaml", "--stage", "grpo"], {"r.yaml": b"\x89PNG\r\n\x1a\n\x00\x00"}, names=("r.yaml",), codes=(2,)),
    *(
        Case(f"override: {s}"[:60], ["grpo", "--recipe", "tiny", "--dry-run", "--json", f"--set={s}"], names=("--set", "tiny"))
        for s in ("=", "a", "train.=1", "rewards.²=1", "rewards.-1=1", "model=1", "model.name.x=1", "train=[]", "train.max_steps=&a [*a]",
                  "train.chat_template_kwargs=&a {b: *a}", "rewards=[]", "rewards={}", "train.learning_rate=.nan", "launch.processes=1" + "0" * 40,
                  "data.path=~nobody-here/x", "train.max_steps=" + "9" * 5000, "train.seed=-1", "[red]=1", "train.[/red]=1")
    ),
]  # fmt: skip
