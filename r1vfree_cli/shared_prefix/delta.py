"""Linear attention (the gated delta rule of Qwen3.5) for groups: every branch starts from its prompt's states.

A layer's own forward runs, once on a prompt and once on its branches side by side, with a stand-in for its cache that
hands over the states of the convolution and of the recurrence. They are parts of the graph: gradients pass through.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F


class States:
    """What a layer asks its cache for, of rows that begin with given states or with none; keeps those they end with.

    conv: (B, channels, kernel - 1) last inputs of the convolution. recurrent: (B, Hv, Dk, Dv).
    """

    recording = True  # also a single token goes the way of many, the only one with gradients

    def __init__(self, conv: torch.Tensor | None = None, recurrent: torch.Tensor | None = None) -> None:
        self.conv, self.recurrent = conv, recurrent

    def expand(self, rows: int) -> States:
        """For `rows` branches of one prompt."""
        if self.conv is None or self.recurrent is None:
            return States()
        return States(self.conv.expand(rows, -1, -1), self.recurrent.expand(rows, -1, -1, -1))

    def get_conv_state(self, *_: Any, **__: Any) -> torch.Tensor | None:
        return self.conv

    def get_recurrent_state(self, *_: Any, **__: Any) -> torch.Tensor | None:
        return self.recurrent

    def has_previous_state(self, *_: Any) -> bool:
        return self.conv is not None

    def is_recording_past(self, *_: Any) -> bool:
        return self.recording

    def update_conv_state(self, x: torch.Tensor, *_: Any, conv_kernel_size: int, **__: Any) -> torch.Tensor:
        """The inputs (B, channels, L) behind those before them."""
        x = x if self.conv is None else torch.cat([self.conv, x], dim=-1)
        missing = conv_kernel_size - 1 - x.shape[-1]
        self.conv = F.pad(x, (missing, 0)) if missing > 0 else x[..., x.shape[-1] - conv_kernel_size + 1 :]
        return x

    def update_recurrent_state(self, state: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.recurrent = state
        return state


class StepStates(States):
    """Of all branches while decoding, in place."""

    recording = False
    conv: torch.Tensor
    recurrent: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[States], sizes: Sequence[int]) -> StepStates:
        """From one state per prompt, for as many branches each as `sizes` says."""
        rows = [state.expand(size) for state, size in zip(prompts, sizes, strict=True)]
        return cls(torch.cat([r.conv for r in rows]), torch.cat([r.recurrent for r in rows]))  # type: ignore[misc]

    def copied(self, other: StepStates) -> StepStates:
        """The same buffers with the values of others."""
        self.conv.copy_(other.conv)
        self.recurrent.copy_(other.recurrent)
        return self

    def keep(self, rows: torch.Tensor) -> StepStates:
        return StepStates(self.conv[rows], self.recurrent[rows])

    def update_recurrent_state(self, state: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.recurrent.copy_(state)


def layers_of(model) -> list:
    """The modules of linear attention in a model."""
    core = model.base_model
    layers = getattr(core, "language_model", core).layers
    return [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]


def takes_layout(module) -> bool:
    """Whether the arguments of a model's call reach its linear attention; transformers passes them on since 5.2x."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values())


def install_scan(module) -> None:
    """Have a layer of linear attention follow `shared_prefix=`; without it, it does what it did."""
    module.forward = partial(_forward, module, module.forward)


def _forward(module, original, hidden_states, *args: Any, shared_prefix=None, **kwargs: Any):
    if shared_prefix is None:
        return original(hidden_states, *args, **kwargs)

    def run(hidden: torch.Tensor, states: States) -> torch.Tensor:
        return original(hidden, cache=states)

    return shared_prefix.scan(module, run, hidden_states, kwargs.get("cache"))
