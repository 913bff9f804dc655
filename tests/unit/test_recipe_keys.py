"""recipes/README.md lists every key of a recipe, from the schema: `python -m tests.unit.test_recipe_keys` writes it."""

import re
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from r1vfree_cli.config import rewards, schema

README = Path(__file__).parents[2] / "recipes" / "README.md"
START, END = "<!-- keys: python -m tests.unit.test_recipe_keys -->\n", "<!-- end of keys -->\n"
SECTIONS = {
    "model": schema.Model,
    "model.lora": schema.Lora,
    "data": schema.Data,
    "data.heldout": schema.Heldout,
    "wrong (sft)": schema.Rows,
    "prompt": schema.Prompt,
    "rewards[]": rewards.Reward,
    "rewards[] feedback": rewards.FeedbackReward,
    "rewards[] feedback.serve": rewards.Serve,
    "rewards[] feedback.canaries": rewards.Canaries,
    "rewards[] feedback.price": rewards.Price,
    "rewards[] FILE.py:FUNCTION": rewards.UserReward,
    "train (grpo)": schema.GrpoTrain,
    "train.guard (grpo)": schema.Guard,
    "eval (grpo)": schema.Evaluation,
    "launch": schema.Launch,
}


def kind(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):  # Annotated: bounds are not shown
        return kind(annotation.__origin__)
    if get_origin(annotation) is list:
        return f"list[{kind(get_args(annotation)[0])}]"
    if isinstance(annotation, type):
        return "section" if issubclass(annotation, BaseModel) else annotation.__name__.replace("NoneType", "null")
    parts = get_args(annotation)
    if str(annotation).startswith("typing.Literal"):
        return " or ".join(f"`{p}`" for p in parts)
    if annotation is Any or not parts or str(annotation).startswith("dict"):
        return str(annotation).replace("typing.", "").replace(" | None", " or null").replace(" | ", " or ")
    return " or ".join(dict.fromkeys(kind(p) for p in parts))


def default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, BaseModel):
        return "its defaults"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


def keys() -> str:
    lines = ["", "| key | type | default |", "| --- | --- | --- |"]
    for name, model in SECTIONS.items():
        base = rewards.Reward if name.startswith("rewards[] ") and issubclass(model, rewards.Reward) else None
        for key, field in model.model_fields.items():
            inherited = base.model_fields.get(key) if base else None
            if inherited is not None and (key == "name" or default(inherited) == default(field)):
                continue
            lines.append(f"| `{name}.{key}` | {kind(field.annotation)} | {default(field)} |")
    return "\n".join([*lines, "", ""])


def test_every_key_of_the_schema_is_in_the_table():
    text = README.read_text(encoding="utf-8")
    assert text[text.index(START) + len(START) : text.index(END)] == keys()


def test_every_section_of_the_schema_is_listed():
    models = {m for m in (vars(schema) | vars(rewards)).values() if isinstance(m, type) and issubclass(m, BaseModel)}
    containers = {
        BaseModel,
        schema.Strict,
        schema._Recipe,
        schema.GrpoRecipe,
        schema.SftRecipe,
        schema.SftTrain,
    }
    containers |= {rewards.FormatReward, rewards.AccuracyReward}
    assert models - containers == set(SECTIONS.values())


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(
        re.sub(f"{START}.*?{END}", lambda m: START + keys() + END, text, flags=re.DOTALL), encoding="utf-8"
    )
