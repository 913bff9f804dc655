"""Packed passes, decoding, the judge's batch and the memory of a pass at the published models' sizes, on a fake GPU.

Kernels do not depend on numbers, and every layer asks for the same ones: one and two layers tell what all of them ask.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from r1vfree_cli.config import recipes
from r1vfree_cli.doctor.probe import memory_estimate
from r1vfree_cli.judges.local import LocalJudge
from r1vfree_cli.models.sampling import keyed_draws, watch_logits
from r1vfree_cli.shared_prefix import decode
from r1vfree_cli.shared_prefix.attention import install
from r1vfree_cli.shared_prefix.decode import _GraphedStep as GraphedStep
from r1vfree_cli.shared_prefix.mixin import SharedPrefixMixin
from r1vfree_cli.shared_prefix.pack import Tree
from tests.published import config
from tests.real.fake_gpu import Asked, FakeGpu, on_gpu

NAMES = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
SIDE = 22  # of an image in merged patches: 616 pixels, what 401,408 pixels allow
IMAGE_TOKENS = SIDE * SIDE
END, PAD, IMAGE, START = 151645, 151643, 151655, 151652


def build(name: str, layers: int, depth: int = 2, **ids: int):
    """A model of published widths with few layers, `depth` of them in its vision tower, on the GPU."""
    small = config(name, num_hidden_layers=layers)
    small.update({"image_token_id": IMAGE} | ids)
    small.vision_config.depth, small.vision_config.fullatt_block_indexes = depth, [1]
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(small, dtype=torch.bfloat16, attn_implementation="sdpa")
    install(model)
    return model.eval()


def prompt(text: int) -> list[int]:
    return [START, *[IMAGE] * IMAGE_TOKENS, START + 1, *range(100, 100 + text)]


def pixels(count: int) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[1, 2 * SIDE, 2 * SIDE]]).expand(count, -1)
    return {"pixel_values": torch.zeros(count * 4 * IMAGE_TOKENS, 1176), "image_grid_thw": grid}


def autocast():
    return torch.autocast("cuda", torch.bfloat16)  # as accelerate has it around every pass


def waits_for_images_alone(inside: Asked) -> None:
    """Of what a pass asked. Where images and windows end is read once each; transformers' own would in every layer."""
    ours = [x for x in inside.syncs + inside.copies if "r1vfree_cli" in x]
    assert all("buckets.py" in x for x in ours), ours
    assert sum("r1vfree_cli" in x for x in inside.syncs) <= 2, inside.syncs


# --- passes ------------------------------------------------------------------------------------------------------


class Passes(SharedPrefixMixin):
    """What the mixin's passes need of a trainer."""

    beta, num_generations, shared_prefix_off, _entropy_bonus_enabled, aux_loss_enabled = 0.04, 8, None, False, False
    _may_skip_idle, _advantages, _encodes_once = True, None, False
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=autocast)

    def __init__(self) -> None: ...


def batch(count: int, answer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, P + C): `count` prompts with an image and eight completions of uneven length for each."""
    rows = [prompt(54 + i) for i in range(count) for _ in range(8)]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row + [7] * answer for row in rows])
    mask = torch.ones_like(ids)
    for i, row in enumerate(rows):
        mask[i, : width - len(row)] = 0
        mask[i, width + answer - 3 * (i % 8) :] = 0
    return ids, mask


@pytest.mark.parametrize(("name", "grad"), zip(NAMES, (True, False), strict=True), ids=["policy", "reference"])
def test_a_packed_pass_waits_before_it_begins(name, grad):
    with FakeGpu() as gpu, torch.set_grad_enabled(grad):
        model = build(name, 2)
        add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
        ids, mask = batch(2, 64)
        seen, own = on_gpu(pixels(2)), Passes()
        gpu.asked = before = Asked()

        def begin(module, *args):
            gpu.asked = Asked()

        model.register_forward_pre_hook(begin)
        logps, entropies, _ = own._get_per_token_logps_and_entropies(
            model, on_gpu(ids), on_gpu(mask), 64, 16, True, num_images=[1, *[0] * 7] * 2, **seen
        )
        assert logps.shape == entropies.shape == (16, 64) and logps.dtype == torch.float32
        assert logps.device.type == "cuda" and logps.requires_grad == grad
    waits_for_images_alone(gpu.asked)
    print(
        f"{name}: {len(before.syncs)} reads before a pass, {len(gpu.asked.syncs)} in it, by transformers or once for all images"
    )
    assert len(before.syncs) <= 3, before.syncs


# --- memory --------------------------------------------------------------------------------------------------------


def saved(recipe, layers: int, depth: int) -> int:
    """Bytes that a policy pass of one group keeps for its backward pass, weights left out: prompts of 1024 tokens and
    completions of full length."""
    kept, weights = dict[int, torch.UntypedStorage](), set[int]()

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # alive, so that no other gets its address
        return x

    own, new, count = Passes(), recipe.trl["max_completion_length"], recipe.train.num_generations
    with FakeGpu(), torch.enable_grad():
        model = build(recipe.model.name, layers, depth)
        weights |= {p.untyped_storage()._cdata for p in model.parameters()}
        add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
        vision = model.config.vision_config
        side = int(recipe.model.max_pixels**0.5) // (2 * vision.patch_size)  # in merged patches
        row = [START, *[IMAGE] * side**2, START + 1]
        ids = torch.tensor([row + [9] * (1024 - len(row)) + [7] * new] * count)
        patches = torch.zeros(4 * side**2, 3 * 2 * vision.patch_size**2)
        grid = torch.tensor([[1, 2 * side, 2 * side]])
        shown = on_gpu({"pixel_values": patches, "image_grid_thw": grid})
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            own._get_per_token_logps_and_entropies(
                model, on_gpu(ids), on_gpu(torch.ones_like(ids)), new, count, True, num_images=[1] + [0] * (count - 1), **shown
            )  # fmt: skip
        return sum(storage.nbytes() for storage in kept.values())


# Those that train all weights with a shared prefix, where nothing is computed twice; recipes with equal passes once.
KEEPING = ["qwen2vl-2b-rlhfv", "qwen2vl-7b-clevr", "qwen25vl-3b-rlhfv", "qwen25vl-3b-2gpu", "qwen25vl-7b-rlhfv"]
KEEPING += ["qwen3vl-4b-rlhfv", "qwen3vl-8b-rlhfv"]


@pytest.mark.parametrize("name", KEEPING)
def test_doctor_estimates_the_activations_that_a_pass_keeps(name, tmp_path):
    """Counted for a layer of each tower, and taken as often as the model has layers."""
    recipe = recipes.load("grpo", name)
    one = saved(recipe, 1, 2)
    full = config(recipe.model.name)
    full.save_pretrained(tmp_path)
    counted = (saved(recipe, 2, 2) - one) * full.get_text_config().num_hidden_layers
    if not recipe.model.freeze_vision:
        counted += (saved(recipe, 1, 3) - one) * full.vision_config.depth
    there = [f"model.name={tmp_path}", "train.gradient_checkpointing=false"]
    estimate = memory_estimate(recipes.load("grpo", name, there), 1024)["activations"]
    print(f"{name}: {counted / 1e9:.1f} GB kept for the backward pass, doctor says {estimate:.1f}")
    assert 0.93 * counted < estimate * 1e9 < 1.15 * counted


# --- decoding ------------------------------------------------------------------------------------------------------

NEW, GROUP = 20, 8  # tokens of a completion, completions of a prompt
PER_LAYER, AROUND, DRAWN = 56, 36, 26  # kernels of a token at most: 54, 34 and 24 when this was written


def decoded(monkeypatch, name: str, layers: int, *, captures: bool) -> tuple[list[Asked], list[Asked]]:
    """Two prompts with an image and 16 branches: what each token's step asked, and what came between it and the next."""
    steps, draws = list[Asked](), list[Asked]()

    class Seen(GraphedStep):
        def __call__(self, tokens, length):
            self.captures = captures
            gpu.asked = Asked()
            steps.append(gpu.asked)
            logits = super().__call__(tokens, length)
            assert logits.shape == (2 * GROUP, model.config.text_config.vocab_size)
            assert (logits.dtype, logits.device.type) == (torch.bfloat16, "cuda")
            gpu.asked = Asked()
            draws.append(gpu.asked)
            return logits

    monkeypatch.setattr(decode, "_GraphedStep", Seen)
    # As training has it: the visual tokens are never sampled.
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        pad_token_id=PAD, eos_token_id=[END, PAD], suppress_tokens=[*range(START, IMAGE + 2)], disable_compile=True,
    )  # fmt: skip
    with FakeGpu() as gpu, torch.no_grad(), keyed_draws((42, 0), range(2 * GROUP), NEW), autocast():
        model = build(name, layers)
        prompts = [prompt(54), prompt(61)]
        ids = torch.tensor([[PAD] * (len(prompts[1]) - len(row)) + row for row in prompts]).repeat_interleave(GROUP, 0)
        shown = pixels(2)
        trees = [Tree(row, shown["image_grid_thw"][i : i + 1]) for i, row in enumerate(prompts)]
        with watch_logits(model):
            out = model.generate(
                input_ids=on_gpu(ids), attention_mask=on_gpu((ids != PAD).long()), generation_config=settings,
                custom_generate=decode.Sampler(), trees=trees, sizes=[GROUP] * 2, images=on_gpu(shown),
            )  # fmt: skip
    assert out.shape == (2 * GROUP, ids.shape[1] + NEW)
    assert len(steps) == len(draws) == NEW - 1  # the prefill gives the first one's logits
    return steps, draws


@pytest.mark.parametrize("name", NAMES)
def test_a_decoded_token_is_one_launch_and_nothing_waits_between_two_looks(name, monkeypatch):
    found = [decoded(monkeypatch, name, layers, captures=True) for layers in (1, 2)]
    for steps, draws in found:
        # A capture stands no wait and no copy from the host: there it would fail, and the step would run as it is.
        assert [x.replays for x in steps] == [1] * len(steps) and not any(x.captured for x in steps[1:])
        assert [x.syncs + x.copies for x in steps] == [[]] * len(steps)
        looks = [i + 2 for i, x in enumerate(draws) if x.syncs]  # tokens drawn by then
        assert looks == list(range(8, NEW, GraphedStep.look_every)), [x.syncs for x in draws]
        assert all(len(x.syncs) <= 1 and not x.copies for x in draws)
    one, two = (steps[0].captured.total() for steps, _ in found)
    launches = max(x.launches for steps, _ in found for x in steps[1:])
    drawn = max(x.launches for _, draws in found for x in draws)
    print(f"{name}: a token takes {two - one} kernels a layer and {2 * one - two} around them, captured as one launch;")
    print(f"  {launches} launches with its inputs, and {drawn} to draw the next token")
    assert 30 < two - one <= PER_LAYER and 2 * one - two <= AROUND
    assert launches <= 8 and drawn <= DRAWN


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_captured_waits_for_nothing_either(name, monkeypatch):
    steps, draws = decoded(monkeypatch, name, 1, captures=False)
    assert [x.syncs + x.copies for x in steps] == [[]] * len(steps) and not any(x.replays for x in steps)
    assert sum(len(x.syncs) for x in draws) == 2
    print(f"{name}: {steps[1].launches} kernels a token with one layer")
    assert steps[1].launches <= PER_LAYER + AROUND + 8


# --- judging -------------------------------------------------------------------------------------------------------


class TakesIds:
    """What a judge needs of a processor, for texts that are token ids and images that are none."""

    image_token_id, merge_size = IMAGE, 2
    tokenizer = SimpleNamespace(encode=list)

    @property
    def image_processor(self):
        return self

    def __call__(self, images: list, return_tensors: str) -> dict[str, torch.Tensor]:
        return pixels(len(images))


@pytest.mark.parametrize(("name", "kind"), zip(NAMES, ("value_head", "yes_no"), strict=True))
def test_a_judges_batch_waits_for_its_scores_alone(name, kind):
    """Two questions with an image, eight answers each: between the beginning of the model's pass and its end r1v asks
    for nothing."""
    answers = [([START, IMAGE, START + 1, *range(100, 140 + i), *[200 + j] * (30 + 3 * j)], (str(i),), ["image"])
               for i in range(2) for j in range(8)]  # fmt: skip
    parts = list[Asked]()

    def part(*args):
        parts.append(gpu.asked)
        gpu.asked = Asked()

    with FakeGpu() as gpu:
        judge = object.__new__(LocalJudge)
        judge.name, judge.kind, judge.prompt, judge.tokens, judge._shares = name, kind, "judge", 0, True
        judge.model, judge.processor, judge.device = build(name, 2), TakesIds(), torch.device("cuda")
        judge._yes, judge._no = 9454, 2753
        width = judge.model.config.text_config.hidden_size
        judge._weight, judge._bias = torch.zeros(width, device="cuda"), torch.zeros((), device="cuda")
        core = judge.model.base_model if kind == "value_head" else judge.model
        core.register_forward_pre_hook(part), core.register_forward_hook(part)
        gpu.asked = Asked()
        scores = judge._scores(answers)
        part()
    assert scores == [1.0] * 16, scores  # what numbers that are not known are read as
    assert judge.tokens > 16 * IMAGE_TOKENS
    before, inside, after = parts
    print(
        f"{name}, {kind}: {before.launches} + {inside.launches} + {after.launches} launches before, in and after a pass"
    )
    waits_for_images_alone(inside)
    assert not before.syncs and len(before.copies) <= 16, before
    assert len(after.syncs) == 1 and len(after.copies) <= 2, after  # the scores; where the rows and Yes and No are
