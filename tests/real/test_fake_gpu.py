"""The packed passes at the published models' sizes, on a fake GPU.

Kernels do not depend on numbers, and every layer asks for the same ones: one and two layers tell what all of them ask.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from r1vfree_cli.shared_prefix.attention import install
from r1vfree_cli.shared_prefix.mixin import SharedPrefixMixin
from tests.published import config
from tests.real.fake_gpu import Asked, FakeGpu, on_gpu

NAMES = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
SIDE = 22  # of an image in merged patches: 616 pixels, what 401,408 pixels allow
IMAGE_TOKENS = SIDE * SIDE
END, PAD, IMAGE, START = 151645, 151643, 151655, 151652


def build(name: str, layers: int, **ids: int):
    """A model of published widths with few layers, on the GPU."""
    small = config(name, num_hidden_layers=layers)
    small.update({"image_token_id": IMAGE} | ids)
    small.vision_config.depth, small.vision_config.fullatt_block_indexes = 2, [1]
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(small, dtype=torch.bfloat16, attn_implementation="sdpa")
    install(model)
    return model.eval()


def prompt(text: int) -> list[int]:
    return [START, *[IMAGE] * IMAGE_TOKENS, START + 1, *range(100, 100 + text)]


def images(count: int) -> dict[str, torch.Tensor]:
    grid = torch.tensor([[1, 2 * SIDE, 2 * SIDE]]).expand(count, -1)
    return {"pixel_values": torch.zeros(count * 4 * IMAGE_TOKENS, 1176), "image_grid_thw": grid}


def autocast():
    return torch.autocast("cuda", torch.bfloat16)  # as accelerate has it around every pass


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
        seen, own = on_gpu(images(2)), Passes()
        gpu.asked = before = Asked()

        def begin(module, *args):
            gpu.asked = Asked()

        model.register_forward_pre_hook(begin)
        logps, entropies, _ = own._get_per_token_logps_and_entropies(
            model, on_gpu(ids), on_gpu(mask), 64, 16, True, num_images=[1, *[0] * 7] * 2, **seen
        )
        assert logps.shape == entropies.shape == (16, 64) and logps.dtype == torch.float32
        assert logps.device.type == "cuda" and logps.requires_grad == grad
    ours = [x for x in gpu.asked.syncs + gpu.asked.copies if "r1vfree_cli" in x]
    # Where images and windows end is read once each; transformers' own would read it in every layer.
    assert all("buckets.py" in x for x in ours), ours
    print(
        f"{name}: {len(before.syncs)} reads before a pass, {len(gpu.asked.syncs)} in it, by transformers or once for all images"
    )
    assert len(before.syncs) <= 3, before.syncs
