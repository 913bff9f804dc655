"""A GPU that has shapes, number formats and places, but no numbers: what a CUDA run asks of it, told on a CPU.

Tensors on "cuda" are torch's fake tensors, tensors on the CPU stay real. So a mixture of devices or number formats
fails as it would on a GPU, and every kernel, every wait of the host and every copy between the two is counted.
Whole numbers that come from the host (token ids, lengths, image sizes) are known as long as only such numbers are
computed from them, so that code which reads them back goes on as it would.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import trl.kernels.chunked_logprob
import trl.trainer.utils
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# No kernel is started for these, nor for views.
_FREE = {"_local_scalar_dense", "_unsafe_view", "alias", "detach", "device", "empty", "empty_like", "empty_strided",
         "lift_fresh", "new_empty", "new_empty_strided"}  # fmt: skip
_PRODUCTS = {"addmm", "addmv", "baddbmm", "bmm", "convolution", "dot", "mm", "mv"}
_KNOWN_AT_MOST = 1 << 20  # numbers of a tensor


@dataclass
class Asked:
    """What the host asked of the GPU.

    kernels: by operator; those of a captured graph are in `captured`, its launches in `replays`.
    syncs: where the host waited for a number. copies: where data went from the host to the device.
    """

    kernels: Counter = field(default_factory=Counter)
    captured: Counter = field(default_factory=Counter)
    replays: int = 0
    syncs: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.replays


class FakeGpu(TorchDispatchMode):
    """While active, `device="cuda"` is the fake GPU; `asked` counts.

    A number that is not known is 1 where r1v reads it (is a branch still running? yes), and 0 where a library does
    (is there something odd? no).
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = Asked()
        self.capturing = False
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = contextlib.ExitStack()
        self._unknown: dict[int, torch.Tensor] = {}  # by storage: what was written over with numbers that are not known

    def __enter__(self):
        self._stack.enter_context(self._fake)
        for patched in _patches(self):
            self._stack.enter_context(patched)
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "aten" and _composite(func.name()):
            with self._on():  # in inference mode they come before they are taken apart
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        from_gpu = any(isinstance(x, FakeTensor) for x in tensors)
        to = kwargs.get("device")
        to_gpu = to is not None and torch.device(to).type == "cuda"
        if not from_gpu and not to_gpu:
            with _disable_current_modes():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func is aten._local_scalar_dense.default or (to is not None and not to_gpu):
            return self._read(func, name, *args, **kwargs)
        # A kernel takes a single number as it takes its other arguments; sent by itself it is copied.
        if any((x.ndim or name == "_to_copy") and not isinstance(x, FakeTensor) for x in tensors):
            self._note(self.asked.copies, name)
        if name in _PRODUCTS and len(found := {x.dtype for x in tensors}) > 1:  # fake tensors do not all say so
            raise RuntimeError(f"{name} of {' and '.join(sorted(map(str, found)))}")
        try:
            out = func(*args, **kwargs)
            self._follow(func, args, kwargs, tensors, out)
        except DynamicOutputShapeException:  # the host waits to learn the shape
            unknown = "r1vfree_cli" in self._note(self.asked.syncs, name)
            out = tree_map_only(torch.Tensor, self._sent, self._on_host(func, args, kwargs, unknown))
        if not func.is_view and name not in _FREE and func.namespace == "aten":
            (self.asked.captured if self.capturing else self.asked.kernels)[name] += 1
        return out

    @contextlib.contextmanager
    def _on(self) -> Iterator[None]:
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _read(self, func, name: str, x: torch.Tensor, *args, **kwargs):
        """What the host gets when it asks for the numbers of `x`."""
        unknown = "r1vfree_cli" in self._note(self.asked.syncs, name)
        with _disable_current_modes():
            return func(self._as_known(x, unknown), *args, **kwargs)

    def _follow(self, func, args, kwargs, tensors: list[torch.Tensor], out) -> None:
        """Compute with what is known, in place too where the operator does."""
        results = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        small = all(x.numel() <= _KNOWN_AT_MOST and not x.is_floating_point() for x in results)
        if not small or "empty" in func.name() or any(self._known(x) is None for x in tensors):
            for x in results if func._schema.is_mutable else ():
                if (known := self._known(x)) is not None:  # so are its views, and what it is a view of
                    self._unknown[known.untyped_storage().data_ptr()] = known
            return
        values = [x for x in tree_leaves(self._on_host(func, args, kwargs)) if isinstance(x, torch.Tensor)]
        for x, value in zip(results, values, strict=True):
            x.known = value

    def _known(self, x: torch.Tensor) -> torch.Tensor | None:
        known = getattr(x, "known", None) if isinstance(x, FakeTensor) else x
        return None if known is None or known.untyped_storage().data_ptr() in self._unknown else known

    def _sent(self, known: torch.Tensor) -> FakeTensor:
        with _disable_current_modes(), self._fake:
            out = torch.empty_like(known, device="cuda")
        out.known = known
        return out

    def _as_known(self, x: torch.Tensor, unknown: bool) -> torch.Tensor:
        known = self._known(x)
        return torch.full(x.shape, unknown, dtype=x.dtype) if known is None else known

    def _on_host(self, func, args, kwargs, unknown: bool = False):
        """The same with what is known, and with `unknown` for what is not."""
        with _disable_current_modes():
            args, kwargs = tree_map_only(FakeTensor, lambda x: self._as_known(x, unknown), (args, kwargs))
            return func(*args, **{k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()})

    def _note(self, places: list[str], name: str) -> str:
        """Write down where the program is; returns that file's path."""
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        where = "/".join(Path(frames[-1].filename).parts[-3:])
        places.append(f"{name} at {where}:{frames[-1].lineno}: {frames[-1].line}")
        if self.capturing:
            raise RuntimeError(f"not permitted while a graph is captured: {places[-1]}")
        return frames[-1].filename


def _composite(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def on_gpu(value):
    """A tensor, or all tensors in a nest of lists and dicts, sent to the fake GPU. Call it inside."""
    return tree_map_only(torch.Tensor, lambda x: x.to("cuda"), value)


def _patches(gpu: FakeGpu) -> Iterator:
    """Of what asks the driver, or needs a compiler for the GPU: streams, graphs, autocast, attention, TRL's kernels."""

    class Stream:
        def wait_stream(self, other) -> None: ...

    class Graph:
        def replay(self) -> None:
            gpu.asked.replays += 1

    @contextlib.contextmanager
    def capture(graph, **kwargs):
        gpu.capturing = True
        try:
            yield
        finally:
            gpu.capturing = False

    on_host = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        if not isinstance(query, FakeTensor):
            return on_host(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is None:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if enable_gqa:
            times = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        grad = torch.is_grad_enabled()
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
        )[0]

    yield patch.object(torch.cuda, "Stream", Stream)
    yield patch.object(torch.cuda, "current_stream", Stream)
    yield patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    yield patch.object(torch.cuda, "CUDAGraph", Graph)
    yield patch.object(torch.cuda, "graph", capture)
    yield patch.object(torch.cuda, "is_bf16_supported", lambda *a: True)
    yield patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    yield patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist())  # its own asks number by number
    yield patch.object(F, "scaled_dot_product_attention", attention)
    for module in (trl.kernels.chunked_logprob, trl.trainer.utils):
        yield patch.object(module, "_use_triton", lambda device: False)
