"""Decoding on the CPU: weights that stay as they are for many small products are laid out for them once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LEAST = 2**17  # weights of a layer, below which calling oneDNN costs more than it saves
MOST = 2**30  # weights of a model, beyond which memory is worth more than time


class _Packed:
    """A linear layer's forward, from its first call on with a copy of the weight in oneDNN's own layout."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.weight: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.layer.weight.detach())
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.layer.bias, "none", [], "")


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Linear layers that `model` uses inside keep a copy of their weights, which must not change meanwhile.

    Otherwise MKL lays a weight out anew for each product, which for the few rows of a decoding step takes as long as
    the product. For float32 without gradients on the CPU; elsewhere nothing changes.
    """
    layers = list[nn.Linear]()
    if torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        layers = [m for m in model.modules() if type(m) is nn.Linear and _gains(m)]
    if sum(layer.weight.numel() for layer in layers) > MOST:
        layers = []
    for layer in layers:
        layer.forward = _Packed(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _gains(layer: nn.Linear) -> bool:
    """Sharded weights have no elements here, and a layer that someone else wraps is left to them."""
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and "forward" not in vars(layer)
    return plain and weight.numel() >= LEAST
