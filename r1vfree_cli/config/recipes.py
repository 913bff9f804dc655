"""Find, load, override and validate recipes; say everything that is wrong with one at once."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ..core.errors import UsageError, brief, did_you_mean, nearest
from ..core.machine import library
from ..core.redact import secrets_in
from .rewards import OWN_REWARDS
from .schema import STAGES, Recipe
from .trl_keys import trl_key_errors, trl_keys


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-6` is a number, only true/false are booleans, a key may stand once."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} is not text")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _kind, _form, _begins in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", ["<"]),  # has no constructor: an error
    ("bool", r"true|True|false|False", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)", list("-+0123456789.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_form})$"), _begins)
# What JSON has, and nothing else: no dates, bytes or sets, which could not be written into a run dir again.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.endswith((":map", ":seq", ":str", ":float", ":bool", ":null"))
}
# YAML 1.1's own would read 010 as eight.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))  # type: ignore[arg-type]
_SHOWN = 100  # errors of one recipe


def recipes_root() -> Path:
    """The folder of shipped recipes: inside an installed wheel, else beside the package in a checkout."""
    here = Path(__file__).parents[1]
    inside = here / "_recipes"
    return inside if inside.is_dir() else here.parent / "recipes"


def shipped(stage: str | None = None) -> dict[str, Path]:
    """`stage/name` -> path of the shipped recipes of one stage, or of all."""
    stages = [stage] if stage else [*STAGES, "eval"]
    return {f"{s}/{p.stem}": p for s in stages for p in sorted((recipes_root() / s).glob("*.yaml"))}


def find(stage: str, name: str) -> Path:
    """The file of a recipe: a path, or a shipped name with or without `stage/`. Raises UsageError: there is none."""
    if name.endswith((".yaml", ".yml")) or os.path.isfile(name):
        if not os.path.isfile(name):
            here = map(str, Path(name).parent.glob("*.y*ml"))
            raise UsageError(f"no recipe file {name}", hint=did_you_mean(name, here, "r1v recipes list"))
        return Path(name)
    have = shipped(stage)
    key = name if "/" in name else f"{stage}/{name}"
    if key in have:
        return have[key]
    other = next((k for k in shipped() if k.split("/")[1] == name or k == name), None)
    if other:
        raise UsageError(f"recipe {other} is for `r1v {other.split('/')[0]}`, not for `r1v {stage}`")
    names, own = [k.split("/")[1] for k in have], map(str, Path().glob("*.yaml"))
    hint = did_you_mean(key.split("/")[1], [*names, *own], "r1v recipes list, or give the path of a YAML file")
    raise UsageError(f"no recipe named {name!r} for {stage}", details=["shipped: " + ", ".join(names)], hint=hint)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML with the strict loader. Raises UsageError: not YAML, a key stands twice, or something holds itself."""
    try:
        document = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        json.dumps(document)  # refuses what holds itself
        return document
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UsageError(f"{where} is not valid YAML: {' '.join(str(e).split())[:300]}") from None


def load_document(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> dict:
    """The recipe file as a dict, with `a.b=value` overrides applied; not validated.

    Raises UsageError: unreadable, not YAML, not a mapping, or an override that points nowhere.
    """
    with library(f"cannot read recipe {path}", UsageError):
        text = path.read_text(encoding="utf-8")
    document = read_yaml(text, f"recipe {path}")
    if not isinstance(document, dict):
        keys = "a mapping with the keys model, data, train, ..."
        raise UsageError(f"recipe {path} must be {keys}, found {type(document).__name__}")
    _locate_code(document, path.parent)
    for item in overrides:
        _override(document, item)
    _locate_code(document, Path.cwd())
    return document


def _locate_code(document: dict, folder: Path) -> None:
    """Give a user's files (`my_rewards.py:brevity`, `my_family.py:FAMILY`) their absolute path, for the workers."""
    rewards = document.get("rewards")
    places = [(reward, "name") for reward in (rewards if isinstance(rewards, list) else ())]
    for node, key in [*places, (document.get("model"), "family")]:
        named = node.get(key) if isinstance(node, dict) else None
        if isinstance(named, str) and ".py:" in named:
            file, _, member = named.rpartition(":")
            node[key] = f"{(folder / os.path.expanduser(file)).resolve()}:{member}"


def _override(document: dict, item: str) -> None:
    key, sign, text = item.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UsageError(f"--set {item!r} is not KEY=VALUE", hint="for example --set train.learning_rate=2e-6")
    key = ".".join(parts)
    value = read_yaml(text, f"--set {key}: value {text!r}")
    node: Any = document
    for i, name in enumerate(parts):
        if not isinstance(node, dict | list):
            raise UsageError(f"--set {key}: {'.'.join(parts[:i])} is {node!r}, it has no key {name!r}")
        place: Any = _list_place(node, name, key) if isinstance(node, list) else name
        if i == len(parts) - 1:
            node[place] = value
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]


def _list_place(items: list, part: str, key: str) -> int:
    """A list item is named by its index or, for rewards, by what metrics call it (`Reward.key`)."""
    rewards = [item if isinstance(item, dict) else {} for item in items]
    names = [str(r.get("label") or str(r.get("name")).rpartition(":")[2]) for r in rewards]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise UsageError(f"--set {key}: no item {part!r}", details=[f"there are: {', '.join(names)}"])


def validate(stage: str, document: dict, where: str) -> Recipe:
    """The typed recipe.

    Raises UsageError: lists every wrong key with what was found, what is allowed and the nearest name.
    """
    model = STAGES[stage]
    refuse_secrets(document, where, "$OPENAI_API_KEY or the variable that api_key_env names, $HF_TOKEN")
    recipe, lines = None, _unfit(document)
    try:
        recipe = None if lines else model.model_validate(document)
    except ValidationError as e:
        lines = [_explain(stage, error) for error in e.errors()[: _SHOWN + 1]]
    train = document.get("train")
    if isinstance(train, dict):
        own = model.model_fields["train"].annotation.model_fields  # type: ignore[union-attr]
        lines += trl_key_errors(stage, {k: v for k, v in train.items() if k not in own})
    if recipe is None or lines:
        many = f"{len(lines)} errors" if len(lines) > 1 else "an error"
        lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else lines
        hint = "r1v recipes show NAME prints the complete recipe"
        raise UsageError(f"recipe {where} has {many}", details=lines, hint=hint)
    return recipe  # type: ignore[return-value]


def refuse_secrets(document: dict, where: str, variables: str) -> None:
    """Raises UsageError where a document holds a key or password. Before other errors, which show what they found."""
    if places := secrets_in(document):
        details = [f"{ascii(place)[1:-1]}: not shown" for place in places[:_SHOWN]]
        hint = f"keys come from the environment: {variables}"
        raise UsageError(f"recipe {where} holds what looks like a key or password", details=details, hint=hint)


def _unfit(value: Any, key: str = "") -> list[str]:
    """A line for each value that no key can take, because files, numbers of the machine or JSON do not hold it."""
    inside: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    lines = [line for k in value for line in _unfit(k, "a key")] if isinstance(value, dict) else []
    lines += [line for k, v in inside for line in _unfit(v, f"{key}.{k}" if key else str(k))]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key}: must be finite; found {value}"]
    if isinstance(value, int) and abs(value) >= 2**63:
        return [f"{key}: is too large a number; found {brief(value)}"]
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        return [f"{ascii(key)[1:-1]}: holds characters that no file name or text can; found {ascii(value)[:80]}"]
    return lines


def _explain(stage: str, error: Any) -> str:
    loc, kind, given = list(error["loc"]), error["type"], error.get("input")
    # A discriminated union adds the tag to the location: rewards.0.feedback.timeout_s
    if loc[:1] == ["rewards"] and len(loc) > 2 and loc[2] in (*OWN_REWARDS, "user"):
        del loc[2]
    key = ".".join(map(str, loc)) or "recipe"
    if kind == "extra_forbidden":
        allowed = _allowed(stage, loc[:-1])
        near = nearest(str(loc[-1]), allowed)
        tail = f"; nearest is {'.'.join(map(str, [*loc[:-1], near]))}" if near else ""
        return f"{key}: unknown key, found {brief(given)}{tail}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}"
    if kind.startswith("union_tag"):
        name = given.get("name") if isinstance(given, dict) else None
        near = nearest(name, OWN_REWARDS) if name else None
        allowed_names = ", ".join((*OWN_REWARDS, "FILE.py:FUNCTION", "package.module:FUNCTION"))
        return f"{key}.name: unknown reward {name!r}; allowed: {allowed_names}" + (f"; nearest is {near}" * bool(near))
    if kind == "literal_error" and (near := nearest(str(given), re.findall(r"'([^']*)'", message))):
        message += f"; nearest is {near}"
    return f"{key}: {message[:1].lower()}{message[1:]}; found {brief(given)}"


def _allowed(stage: str, loc: list) -> list[str]:
    """Names allowed at a place in a recipe."""
    model: Any = STAGES[stage]
    for part in loc:
        if not isinstance(part, int):
            field = getattr(model, "model_fields", {}).get(part)
            model = field and _model_of(field.annotation)
    names = list(model.model_fields) if model else []
    return names + list(trl_keys(stage)) if model and model.__name__.endswith("Train") else names


def _model_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [m for a in get_args(annotation) if (m := _model_of(a)) is not None]
    # Of the rewards, feedback has all keys.
    return next((m for m in found if m.__name__ == "FeedbackReward"), found[-1] if found else None)


def load(stage: str, name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Find, read, override, validate: what every command calls."""
    return validate(stage, load_document(find(stage, name), overrides), name)


def to_yaml(recipe: BaseModel) -> str:
    """The fully resolved recipe; `load` reads it back to an equal one."""
    return dump(recipe.model_dump(mode="json"))


def dump(document: dict) -> str:
    """YAML of a plain document, in its own order."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """`a.b: old -> new` for each value that differs between two documents."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{key}: {brief(before)} -> {brief(after)}"]
    found = (differences(before.get(k), after.get(k), f"{key}.{k}" if key else str(k)) for k in before | after)
    return [line for lines in found for line in lines]


def summary(name: str, path: Path) -> dict[str, Any]:
    """What `recipes list` shows of a recipe: `gpus` of a node, the judge's included, None on the CPU; `gb` a GPU."""
    document, text = load_document(path), path.read_text(encoding="utf-8")
    launch = document.get("launch") or {}
    served = [r["serve"].get("devices") or [] for r in document.get("rewards") or [] if r.get("serve")]
    on_cpu = not launch or "cpu" in (launch.get("preset"), launch.get("device"))
    gpus = None if on_cpu else launch.get("processes", 1) // launch.get("nodes", 1) + sum(map(len, served))
    said = re.search(r"^# Hardware:.*?\bof (\d+) GB", text, re.MULTILINE)
    gb = int(said[1]) if gpus and said else None
    return {"recipe": name, "gpus": gpus, "gb": gb, "purpose": text.splitlines()[0].lstrip("# ").strip()}


def stage_and_name(name: str, stage: str | None) -> tuple[str, str]:
    """Which stage a recipe is for: as told, as its folder or shipped name says, as the file's keys say.

    Raises UsageError: a path whose stage cannot be told, or an ambiguous name.
    """
    if stage not in (None, *STAGES):
        raise UsageError(f"no stage {stage!r}", details=["allowed: " + ", ".join(STAGES)])
    if stage:
        return stage, name
    parts = Path(name).parts
    if len(parts) > 1 and parts[-2] in (*STAGES, "eval"):
        return parts[-2], name
    if os.path.isfile(name):
        return ("grpo" if "rewards" in load_document(Path(name)) else "sft"), name
    stages = [s for s in STAGES if f"{s}/{name}" in shipped(s)]
    if len(stages) > 1:
        raise UsageError(f"recipe {name!r} is in {' and '.join(stages)}", hint=f"write {stages[0]}/{name}")
    if not stages:
        raise UsageError(f"cannot tell the stage of recipe {name!r}", hint="--stage grpo or --stage sft")
    return stages[0], name
