"""One rank of a run with the shared-prefix engine: `shared_prefix_rank.py MODEL OUT PRESET`."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from test_shared_prefix import RANK_ROWS, Shared, build, completions, generate, rows


def main(path: str, out: str, preset: str) -> None:
    rank = int(os.environ["RANK"])
    scratch = Path(tempfile.mkdtemp())
    config = {}
    if preset == "zero3":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        config["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    trainer = build(
        Shared,
        path,
        scratch,
        rows(RANK_ROWS[preset]),
        per_device_train_batch_size=6,  # the second of three groups of four is cut between the ranks
        learning_rate=0.05,
        ds3_gather_for_generation=False,
        ddp_backend="gloo",
        log_multimodal=False,  # TRL would wait for images of the rank that has none
        **config,
    )
    assert trainer.shared_prefix_off is None
    trainer.table = completions(12)[6 * rank : 6 * rank + 6]
    trainer.train()
    logged = next(h for h in trainer.state.log_history if "loss" in h)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    # Generation in which the ranks end after different numbers of tokens.
    trainer.table = None
    trainer.generation_config.max_new_tokens = 4 + 5 * rank
    generated = generate(trainer)
    if rank == 0:
        torch.save(
            {
                "loss": logged["loss"],
                "grad_norm": float(logged["grad_norm"]),
                "weights": {k.removeprefix("module."): v for k, v in weights.items()},
                "generated": generated,
            },
            out,
        )
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as the real workers end: taking gloo's threads down with the interpreter aborts now and then
