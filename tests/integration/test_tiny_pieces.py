"""The tiny recipe's processor, models and judge trainer, on a few rows; the recipe itself is run elsewhere."""

from __future__ import annotations

import io
import random

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from r1vfree_cli.core import prompts
from r1vfree_cli.core.prompts import judge_messages
from r1vfree_cli.data import shapes
from r1vfree_cli.judges.local import LocalJudge
from r1vfree_cli.tiny import judge as tiny_judge
from r1vfree_cli.tiny import models as tiny


@pytest.fixture(scope="module")
def processor():
    return tiny.make_processor()


@pytest.fixture(scope="module")
def groups():
    return tiny_judge.by_image(shapes.iter_shapes("judge", 0, 400))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "judge"
    tiny.main(["judge", str(out), "--seed", "5", "--steps", "0"])
    return out


def test_saved_pieces_load_as_the_real_classes(saved):
    model = AutoModelForImageTextToText.from_pretrained(saved)
    processor = AutoProcessor.from_pretrained(saved)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert type(processor) is Qwen2_5_VLProcessor
    assert model.generation_config.do_sample in (None, False)
    assert processor.tokenizer.eos_token == "<|im_end|>" and processor.tokenizer.pad_token == "<|endoftext|>"
    assert model.config.text_config.vocab_size == len(processor.tokenizer)


@pytest.mark.parametrize(
    "text", ["What model of a vehicle is it?", "héllo wörld ☃ 日本語 \x00\n\t  x", "<|im_start|", "a<think", "１２ ½"]
)
def test_any_text_survives_the_tokenizer(processor, text):
    import unicodedata

    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_words_of_the_recipe_are_single_tokens(processor):
    tokenizer = processor.tokenizer
    for kind in shapes.KINDS:
        for answer in shapes.ANSWERS[kind]:
            assert len(tokenizer(answer)["input_ids"]) == 1
    assert tokenizer.encode("Yes")[0] != tokenizer.encode("No")[0]
    longest = prompts.user_text("Is the yellow triangle in the sky or on the ground?")
    assert len(tokenizer(longest)["input_ids"]) < 20  # the instruction is one token
    assert tokenizer.decode(tokenizer(longest)["input_ids"]) == longest


def test_tags_are_kept_when_special_tokens_are_left_out(processor):
    target = prompts.target_text("red circle, blue square, green triangle", "above")
    ids = processor.tokenizer(target)["input_ids"]
    text = processor.tokenizer.decode([*ids, processor.tokenizer.eos_token_id], skip_special_tokens=True)
    assert text == target
    assert prompts.parse(text).problem is None
    assert len(ids) + 1 <= 20  # the recipe's max_completion_length


def test_prompt_puts_the_image_first_and_expands_it(processor):
    image = Image.new("RGB", (56, 56))
    text = processor.apply_chat_template(
        prompts.build_messages("How many shapes are there?"), tokenize=False, add_generation_prompt=True
    )
    batch = processor(text=[text], images=[image], return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 4
    assert processor.tokenizer.decode(ids[:4]) == "<|im_start|>user\n<|vision_start|>"
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_photos_of_any_size_become_small(processor):
    batch = processor.image_processor(images=[Image.new("RGB", (1000, 640))], return_tensors="pt")
    assert int(batch["image_grid_thw"].prod()) // 4 <= 4


def test_seeds_make_other_weights_and_the_same_seed_the_same(processor):
    one, same, other = (tiny.make_model(processor, seed, layers=2) for seed in (1, 1, 2))
    weights = [m.lm_head.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(tiny.INIT_STD, rel=0.05)


def test_packed_verdicts_are_what_the_judge_will_say(saved, groups):
    """A branch sees the image and itself only, at the positions it would have alone."""
    judge = LocalJudge(str(saved))
    packer = tiny_judge.Packer(judge.processor, judge.model)
    rng = random.Random(0)
    chosen = groups[:3]
    asked = [tiny_judge.claims(rng, group) for group in chosen]
    images = tiny_judge.pixel_values(judge.processor, [group[0]["images"][0] for group in chosen]).flatten(0, 1)
    inputs, _, _, verdicts = packer.pack(images, asked)
    with torch.no_grad():
        hidden = judge.model.model(**inputs).last_hidden_state.flatten(0, 1)
        _, logits = verdicts.loss(judge.model, hidden)
    packed = logits[:, [packer.yes, packer.no]].softmax(-1)[:, 0]
    alone = judge.score(
        [
            ([Image.open(io.BytesIO(group[0]["images"][0]))], claim.problem, claim.answer)
            for group, claims in zip(chosen, asked)
            for claim in claims
        ]
    )
    assert packed.std() > 1e-3
    torch.testing.assert_close(packed, torch.tensor(alone), rtol=1e-3, atol=1e-5)


def test_targets_stand_where_their_words_are(processor, groups):
    model = tiny.make_model(processor, 0, layers=1)
    packer = tiny_judge.Packer(processor, model)
    asked = [
        [
            tiny_judge.Claim("What colour is the circle?", "red circle, blue square", "red circle, blue square"),
            tiny_judge.Claim("What colour is the circle?", "blue", "red"),
        ]
    ]
    images = tiny_judge.pixel_values(processor, [groups[0][0]["images"][0]]).flatten(0, 1)
    inputs, words, early, verdicts = packer.pack(images, asked)
    ids = inputs["input_ids"].flatten().tolist()
    decode = processor.tokenizer.decode
    assert decode(words.ids) == "red circle, blue squarered"
    assert [ids[at + 1] for at in words.at[:-1]] == words.ids[:-1]
    assert decode([ids[words.at[-1] + 1]]) == "blue"
    assert [decode([ids[at]])[0] for at in early.at] == ['"', '"']
    assert [decode(ids[at - 2 : at + 1]) for at in verdicts.at] == ["<|im_start|>assistant\n"] * 2
    assert verdicts.ids == early.ids == [packer.yes, packer.no]


def test_branch_has_the_whole_prompt(processor):
    packer = tiny_judge.Packer(processor, tiny.make_model(processor, 0, layers=1))
    branch = packer.branch("Is there a red circle?", "yes")
    text = processor.apply_chat_template(
        judge_messages("Is there a red circle?", "yes"), tokenize=False, add_generation_prompt=True
    )
    whole = [*packer.prefix[0].tolist(), *branch.ids]
    assert processor.tokenizer.decode(whole) == text.replace("<|image_pad|>", "<|image_pad|>" * 4)
    assert processor.tokenizer.decode(branch.ids[branch.start : branch.end]) == "yes"


def test_claims_are_right_and_wrong_as_they_say(groups):
    rng = random.Random(1)
    for group in groups:
        truth = {row["problem"]: row["solution"] for row in group}
        for claim in tiny_judge.claims(rng, group):
            assert claim.right == (claim.answer == truth[claim.problem])


def test_training_lowers_the_loss_and_sees_images(processor, groups):
    """A few steps are not enough to judge; they are enough to read the fixed text and to say Yes or No."""
    model = tiny.make_model(processor, 3, layers=2)
    packer = tiny_judge.Packer(processor, model)
    asked = [tiny_judge.claims(random.Random(2), group) for group in groups[:16]]
    images = tiny_judge.pixel_values(processor, [g[0]["images"][0] for g in groups[:16]]).flatten(0, 1)

    def loss() -> float:
        with torch.no_grad():
            inputs, _, _, verdicts = packer.pack(images, asked)
            return verdicts.loss(model, model.model(**inputs).last_hidden_state.flatten(0, 1))[0].item()

    before = loss()
    visual = model.model.visual.patch_embed.proj.weight.clone()
    tiny_judge.train(model, processor, groups, steps=15, seed=0)
    assert loss() < 0.5 * before
    assert not torch.equal(visual, model.model.visual.patch_embed.proj.weight)
