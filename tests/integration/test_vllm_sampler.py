"""Prompts as vLLM takes them, without vLLM; tests/real draws with it."""

import math

import pytest
import torch

from r1vfree_cli.core.errors import R1VError
from r1vfree_cli.training.vllm_sampler import collapsed, image_offsets, importance

I = 9  # noqa: E741 # the image token


@pytest.mark.parametrize(
    "ids, lengths, offsets, short",
    [
        ([1, 2], [], [], [1, 2]),
        ([1, I, I, I, 2], [3], [1], [1, I, 2]),
        ([I, I, 1, I, 2], [2, 1], [0, 3], [I, 1, I, 2]),
        ([1, I, I, I, I, 2], [3, 1], [1, 4], [1, I, I, 2]),  # they touch
    ],
)
def test_one_token_an_image(ids, lengths, offsets, short):
    assert image_offsets(ids, lengths, I) == offsets
    assert collapsed(ids, lengths, I) == short


@pytest.mark.parametrize(
    "ids, lengths", [([1, I, I, 2], [3]), ([1, I, I, 2], [1]), ([1, I, 2, I], [2]), ([1, 2], [1]), ([I], [])]
)
def test_other_numbers_of_image_tokens_are_refused(ids, lengths):
    with pytest.raises(R1VError, match="image tokens"):
        collapsed(ids, lengths, I)


def test_effective_sample_size():
    same = importance(torch.zeros(8))
    assert same == {"ratio/mean": 1, "ratio/max": 1, "effective_sample_size": 1}
    one = importance(torch.tensor([0.0, -50.0, -50.0, -50.0]))
    assert math.isclose(one["effective_sample_size"], 1 / 4) and math.isclose(one["ratio/mean"], 1 / 4)
    halves = importance(torch.tensor([math.log(3.0), 0.0], dtype=torch.float64))
    assert math.isclose(halves["effective_sample_size"], 16 / 20) and math.isclose(halves["ratio/max"], 3)
