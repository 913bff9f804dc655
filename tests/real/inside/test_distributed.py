"""Weights reach vLLM after an update: two processes with data parallel in bfloat16, two under ZeRO-3, one with LoRA.

Forked, because importing torch, TRL and vLLM in each would take longer than the rest; nothing was computed before.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback

import pytest
import torch
from peft import LoraConfig
from rollouts import PROMPTS, SAME, differences, engine, make_trainer, prompts_of
from tiny_models import load_tiny, save_tiny

IMAGES = tuple(p for p in PROMPTS if p[1])  # text alone is refused under ZeRO-3
CASES = {
    # (processes, settings, largest mean difference after an update)
    "ddp": (2, {"bf16": True}, 2e-2),
    "zero3": (2, {"use_cpu": False}, SAME),
    "lora": (1, {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])}, SAME),
}


# What `accelerate launch` tells its ranks of recipes/launch/zero3.yaml.
ZERO3 = {
    "USE_DEEPSPEED": "true",
    "DEEPSPEED_ZERO_STAGE": "3",
    "DEEPSPEED_ZERO3_INIT": "false",
    "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}


def complete(trainer, model):
    """A model with the trainer's weights: its own, or `model` with what is gathered where they are sharded."""
    if not trainer.is_deepspeed_enabled:
        return trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    shared = [state and {k.removeprefix("module."): v for k, v in state.items()}]
    torch.distributed.broadcast_object_list(shared)
    model.load_state_dict(shared[0])
    return model


def rank_of(case, folder, out, rank, port, pipe) -> None:
    """Train two steps, sample with the weights of the last sync and with the trained ones; tell how far each is off."""
    try:
        processes, settings, _ = CASES[case]
        plain, _ = load_tiny(folder)  # as long as it would not be sharded
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
        if case == "zero3":
            os.environ |= {f"ACCELERATE_{name}": value for name, value in ZERO3.items()}
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, as in worker.py
        settings = settings | ({"ddp_backend": "gloo"} if processes > 1 else {})
        with engine(enforce_eager=True):
            trainer = make_trainer(folder, out, IMAGES, learning_rate=2e-2, **settings)
        assert trainer._zero3 == (case == "zero3")
        trainer.train()
        ids, images = prompts_of(trainer, IMAGES)
        model, sampler = complete(trainer, plain).eval(), trainer.vllm_generation
        found = []
        for sync in (False, True):
            if sync:
                sampler.sync_weights()
            _, sampled, logprobs, _ = sampler.generate(ids, images, 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(trainer.args.bf16)):
                found.append(differences(trainer, ids, images, sampled, logprobs, model).mean().item())
        pipe.send((trainer.accelerator.num_processes, *found))
    except BaseException:
        pipe.send(traceback.format_exc())
    sys.stdout.flush()
    os._exit(0)  # gloo's and vLLM's threads are not taken down one by one


@pytest.mark.parametrize("case", CASES)
def test_weights_arrive_after_an_update(case, tmp_path):
    folder = save_tiny(tmp_path / "model", "qwen2_5_vl", width=128)
    processes, _, most = CASES[case]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork, ranks = multiprocessing.get_context("fork"), []
    for rank in range(processes):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=rank_of, args=(case, folder, tmp_path / "out", rank, port, theirs))
        process.start()
        ranks.append((process, ours))
    try:
        for _, ours in ranks:
            assert ours.poll(300), "no answer"
            told = ours.recv()
            assert not isinstance(told, str), told
            counted, stale, fresh = told
            assert counted == processes
            assert fresh < most < stale / 5, told
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
