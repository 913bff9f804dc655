"""Chat templates that begin the reply's thinking, with Qwen3.5's own as TRL carries them."""

from pathlib import Path

import pytest
import trl
from tiny_models import save_tiny

from r1vfree_cli.config.schema import Model
from r1vfree_cli.core.prompts import build_messages, judge_messages, parse, target_text
from r1vfree_cli.judges.local import LocalJudge
from r1vfree_cli.models.load import load_processor, open_processor
from r1vfree_cli.training.sft import Collator

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
HEADER = "<|im_start|>assistant\n"


def save(folder: Path, template: str) -> Path:
    """A tiny model with one of TRL's templates."""
    save_tiny(folder)
    processor = open_processor(str(folder), what="it")
    processor.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    processor.save_pretrained(folder)
    return folder


def rendered(processor, messages=None) -> str:
    return processor.apply_chat_template(messages or build_messages("Why?"), tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", ["qwen3_5_think", "qwen3_5_nothink", "qwen3_vl"])
def test_the_policy_opens_its_thinking_itself(template, tmp_path):
    folder = save(tmp_path / "model", template)
    published = rendered(open_processor(str(folder), what="it"))
    processor = load_processor(Model(name=str(folder), dtype="float32"))
    prompt = rendered(processor)
    assert prompt.endswith(f"inside <answer> </answer> tags.<|im_end|>\n{HEADER}")
    assert published.startswith(prompt)  # nothing else is changed
    reply = published[len(prompt) :] + target_text("Because.", "blue").removeprefix("<think>")
    if template == "qwen3_5_think":  # what the model writes after its own opening has the asked form
        assert parse(reply).problem is None

    processor.save_pretrained(tmp_path / "final")  # as a run does: the evaluation sees the same prompt
    again = load_processor(Model(name=str(folder), dtype="float32"), folder=str(tmp_path / "final"))
    assert rendered(again) == prompt
    assert again.chat_template == processor.chat_template

    row = {"problem": "Why?", "solution": "blue", "thinking": "Because.", "images": []}
    batch = Collator(processor)([row])
    assert processor.tokenizer.decode(batch["input_ids"][0]).count("<think>") == 2  # the instruction's and the reply's


@pytest.mark.parametrize("template", ["qwen3_5_think", "qwen3_5_nothink", "qwen3_vl"])
def test_a_judge_is_read_after_its_thinking(template, tmp_path):
    folder = save(tmp_path / "judge", template)
    published = open_processor(str(folder), what="it")
    asked = judge_messages("Why?", "blue")
    wanted = published.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert rendered(LocalJudge(str(folder), device="cpu").processor, asked) == wanted
