"""What a whole GRPO step costs with shared prefixes and without: `python -m tests.bench.grpo_step`.

Both trainers run in one process, alternating, on the same weights and prompts and with the same number of tokens.
FLOPs are those of all matrix products and attention kernels, counted while they run; times are CPU seconds of the
process, the least over the repeats. Nothing is downloaded. On a GPU: `python -m tests.gpu.grpo_step`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

from r1vfree_cli.core.prompts import user_text
from r1vfree_cli.shared_prefix.mixin import SharedPrefixMixin
from tests.integration.tiny_models import draw, tiny_processor

# (image side in pixels, new tokens, completions per prompt): least ratio of FLOPs, of CPU time, and what to reach for
CASES = {
    (448, 64, 8): (5.2, 4.5, 5.5),
    (448, 64, 16): (7.4, 7.0, 9.0),
    (448, 256, 8): (2.85, 2.7, 3.5),
    (448, 64, 4): (3.2, 2.7, 3.2),
    (224, 64, 8): (3.2, 2.5, 3.3),
}
GROWTH = [(448, 64, g) for g in (4, 8, 16, 32)] + [(s, 64, 8) for s in (224, 336)] + [(448, n, 8) for n in (16, 128)]
PARTS = ("preprocess", "vision", "prefill", "decode", "reference", "forward", "backward", "optimizer", "other")
PROMPTS = 2
QUESTIONS = ("How many red circles are there to the left of the largest square in this picture?", "What is it?")


def bench_model(processor):
    """A Qwen2.5-VL of 35 million weights: text 512 x 8 layers, vision 320 x 8 layers, f32."""
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "max_position_embeddings": 4096,
        },
        vision_config={
            "depth": 8,
            "hidden_size": 320,
            "out_hidden_size": 512,
            "num_heads": 5,
            "intermediate_size": 768,
            "fullatt_block_indexes": [3, 7],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def prepare(folder: Path) -> Path:
    """Write the model once; the policy and the reference are loaded from it."""
    processor = tiny_processor("qwen2_5_vl", max_pixels=1024 * 1024)
    model = bench_model(processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[2] * (dim + value[3])


def _attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Scores once more, their gradient, and those of query, key and value."""
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[2] * (3 * dim + 2 * value[3])


def _packed_linear(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x) * weight[0]


# What torch's counter does not know: attention kernels of the CPU, and products with packed weights.
CPU_KERNELS = {
    torch.ops.mkldnn._linear_pointwise: _packed_linear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Parts:
    """Seconds and FLOPs by part of the step; a part inside another counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)
        self.counter: FlopCounterMode | None = None
        self._stack: list[str] = []
        self._mark = (0.0, 0)

    def _now(self) -> tuple[float, int]:
        return now(), self.counter.get_total_flops() if self.counter else 0

    def _switch(self) -> None:
        now = self._now()
        if self._stack:
            self.seconds[self._stack[-1]] += now[0] - self._mark[0]
            self.flops[self._stack[-1]] += now[1] - self._mark[1]
        self._mark = now

    @contextmanager
    def part(self, name: str):
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def wrap(self, owner, method: str, name):
        """Count calls of `owner.method` as `name` (a string, or a function of the call's arguments)."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def now() -> float:
    """Seconds of this process's CPU, which other processes do not lengthen; on a GPU, of the clock."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


class Steps:
    """One trainer whose optimizer steps can be run and measured one by one."""

    def __init__(self, folder: Path, side: int, new: int, generations: int, *, shared: bool, **config) -> None:
        processor = tiny_processor("qwen2_5_vl", max_pixels=1024 * 1024)
        processor.tokenizer.padding_side = "left"
        rows = [
            {"prompt": [{"role": "user", "content": user_text(q)}], "images": [draw(i, (side, side))]}
            for i, q in zip(range(PROMPTS), QUESTIONS, strict=True)
        ]
        features = Features(
            {"prompt": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())}
        )
        cls = type("Trainer", (SharedPrefixMixin, GRPOTrainer), {"shared_prefix": shared})
        ids = processor.tokenizer.convert_tokens_to_ids
        never = [ids("<|image_pad|>"), ids("<|video_pad|>")]
        peft = config.pop("peft_config", None)
        defaults = {
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,
            "report_to": [],
            "per_device_train_batch_size": PROMPTS * generations,
            "num_generations": generations,
            "max_completion_length": new,
            "beta": 0.04,
            "gradient_checkpointing": False,
            "learning_rate": 1e-6,
            "generation_kwargs": {"min_new_tokens": new, "suppress_tokens": never},
        }
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=config.pop("model_dtype", torch.float32))
        self.trainer = cls(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(tempfile.mkdtemp(), **{**defaults, **config}),
            train_dataset=Dataset.from_list(rows, features=features),
            processing_class=processor,
            peft_config=peft,
        )
        self.parts = Parts()
        self._instrument()
        trainer = self.trainer
        self.optimizer = trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, self.optimizer)
        trainer.model_wrapped = self.model
        trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(trainer.get_train_dataloader())
        self.batch = next(self.batches)  # the same prompts in every step

    def _instrument(self) -> None:
        trainer, parts = self.trainer, self.parts
        parts.wrap(trainer, "_tokenize_prompts", "preprocess")
        parts.wrap(trainer, "_generate_single_turn", "decode")
        parts.wrap(
            trainer,
            "_get_per_token_logps_and_entropies",
            lambda *a, **k: "forward" if torch.is_grad_enabled() else "reference",
        )
        parts.wrap(trainer.accelerator, "backward", "backward")
        models = [getattr(m, "get_base_model", lambda m=m: m)() for m in (trainer.model, trainer.ref_model) if m]
        for model in models:
            parts.wrap(model.base_model.visual, "forward", "vision")
        inner = models[0].base_model.language_model
        original = inner.forward

        def text(*args, **kwargs):
            prefill = parts._stack[-1:] == ["decode"] and kwargs["inputs_embeds"].shape[1] > 1
            with parts.part("prefill") if prefill else nullcontext():
                return original(*args, **kwargs)

        inner.forward = text
        processor = trainer.processing_class

        class Timed:
            def __getattr__(self, name):
                return getattr(processor, name)

            def __call__(self, *args, **kwargs):
                with parts.part("preprocess"):
                    return processor(*args, **kwargs)

        trainer.processing_class = Timed()

    def step(self) -> None:
        """One optimizer step."""
        with self.parts.part("other"):
            self.trainer.training_step(self.model, self.batch, None)
            with self.parts.part("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()

    def count(self) -> dict[str, int]:
        """FLOPs of one step by part."""
        self.parts.flops.clear()
        with FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
            self.parts.counter = counter
            self.step()
        self.parts.counter = None
        return dict(self.parts.flops)

    def timed(self) -> dict[str, float]:
        """Seconds of one step by part."""
        self.parts.seconds.clear()
        self.step()
        return dict(self.parts.seconds)


def matmul_peak() -> float:
    """FLOP/s of the best f32 matrix product this machine does on the threads in use."""
    best = 0.0
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(5):
            start = now()
            a @ b
            best = max(best, 2 * n**3 / (now() - start))
    return best


def measure(folder: Path, case: tuple[int, int, int], repeats: int) -> dict:
    """FLOPs and the least seconds of both trainers, steps alternating."""
    both = {name: Steps(folder, *case, shared=name == "r1v") for name in ("trl", "r1v")}
    out = {name: {"flops": steps.count()} for name, steps in both.items()}
    runs: dict[str, list[dict]] = {"trl": [], "r1v": []}
    for _ in range(repeats):
        for name, steps in both.items():
            runs[name].append(steps.timed())
    for name, all_runs in runs.items():
        if all_runs:
            out[name]["seconds"] = min(all_runs, key=lambda r: sum(r.values()))
    return out


def peak_memory(folder: Path, case: tuple[int, int, int], name: str) -> float:
    """Peak resident memory (GB) of a process of its own that runs two steps."""
    command = [sys.executable, "-m", "tests.bench.grpo_step", "--memory-of", name, "--model", str(folder)]
    command += ["--case", ",".join(map(str, case))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_resident() -> float:
    """GB; of this program alone, where getrusage's figure begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9


def total(values: dict[str, float]) -> float:
    return sum(values.values())


def show_parts(result: dict) -> None:
    print(f"  {'part':<11}{'TRL GFLOP':>12}{'r1v GFLOP':>12}{'ratio':>8}{'TRL s':>9}{'r1v s':>9}{'ratio':>8}")
    timed = "seconds" in result["trl"]
    for part in (*PARTS, "whole step"):
        pick = total if part == "whole step" else (lambda values, part=part: values.get(part, 0))
        f, g = (pick(result[n]["flops"]) / 1e9 for n in ("trl", "r1v"))
        line = f"  {part:<11}{f:>12.1f}{g:>12.1f}{f / g if g else float('nan'):>8.2f}"
        if timed:
            s, t = (pick(result[n]["seconds"]) for n in ("trl", "r1v"))
            line += f"{s:>9.2f}{t:>9.2f}{s / t if t else float('nan'):>8.2f}"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each trainer; 0 counts FLOPs only")
    parser.add_argument("--case", help="one case only, as PIXELS,TOKENS,COMPLETIONS")
    parser.add_argument("--growth", action="store_true", help="the table over completions, image size and length")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--model", type=Path, help="a folder of a model to use instead of writing one")
    parser.add_argument("--memory-of", choices=("trl", "r1v"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or prepare(Path(scratch))
        case = tuple(int(x) for x in args.case.split(",")) if args.case else None
        if args.memory_of:
            steps = Steps(folder, *case, shared=args.memory_of == "r1v")
            steps.step(), steps.step()
            print(peak_resident())
            return 0
        if args.growth:
            return growth(folder)
        return compare(folder, [case] if case else list(CASES), args)


def compare(folder: Path, cases: list, args) -> int:
    failed = []
    for number, case in enumerate(cases):
        result = measure(folder, case, args.repeats)
        print(f"\n{case[0]} px, {case[1]} new tokens, {case[2]} completions of each of {PROMPTS} prompts")
        show_parts(result)
        flops = total(result["trl"]["flops"]) / total(result["r1v"]["flops"])
        least = CASES.get(case, (0, 0, 0))
        summary = {"case": case, "flops": round(flops, 3), "least_flops": least[0]}
        if flops < least[0]:
            failed.append(f"{case}: FLOPs ratio {flops:.2f} below {least[0]}")
        if args.repeats:
            seconds = {n: total(result[n]["seconds"]) for n in ("trl", "r1v")}
            peak = matmul_peak()
            summary["cpu_time"] = round(seconds["trl"] / seconds["r1v"], 3)
            summary["least_cpu_time"], summary["stretch"] = least[1:]
            summary["matmul_peak_gflops"] = round(peak / 1e9, 1)
            for n in ("trl", "r1v"):
                summary[f"{n}_share_of_peak"] = round(total(result[n]["flops"]) / seconds[n] / peak, 3)
        if not args.no_memory and number == 0:
            for n in ("trl", "r1v"):
                summary[f"{n}_peak_gb"] = round(peak_memory(folder, case, n), 2)
        print("  " + json.dumps(summary))
    for line in failed:
        print("below the least:", line)
    return 1 if failed else 0


def growth(folder: Path) -> int:
    """FLOPs of a step over completions, image size and length: what a prompt costs does not grow with completions."""
    print("GFLOP of one step; TRL's is counted at 4 completions and grows in proportion")
    print(f"{'px':>5}{'tokens':>8}{'G':>4}{'TRL':>10}{'r1v':>10}{'ratio':>8}{'vision + prefill':>18}")
    for side, new, generations in GROWTH:
        few = total(Steps(folder, side, new, 4, shared=False).count())
        parts = Steps(folder, side, new, generations, shared=True).count()
        trl, own = few * generations / 4 / 1e9, total(parts) / 1e9
        prompt = (parts["vision"] + parts["prefill"]) / 1e9
        print(f"{side:>5}{new:>8}{generations:>4}{trl:>10.1f}{own:>10.1f}{trl / own:>8.2f}{prompt:>18.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
