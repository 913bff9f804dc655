"""Trains the tiny recipe's judge: a small VLM whose P(Yes) says whether an answer fits image and question.

Its scenes are its own (`shapes`, split `judge`), never the policy's. A batch row holds one image and, as branches that
see the image and themselves, several questions with a right and a wrong answer each. Beside the verdict, the words of
right answers are learnt as text is: what the answer should be is most of what a verdict needs.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from PIL import Image

from ..core import console
from ..core.prompts import judge_messages
from ..data import shapes
from ..shared_prefix.pack import prompt_positions

STEPS = 250
IMAGES = 24  # a step
QUESTIONS = 3  # an image, beside its caption
WEIGHTS = {"colour": 1, "count": 1.5, "shape": 1.5, "relation": 1.5, "presence": 2}  # what is learnt last weighs more
EASY_SHARE = 0.25  # of the steps, first: images with one shape
STRAY_SHARE = 0.2  # of wrong answers: words that no such question has for an answer
STRAYS = ["Yes", "No", ":", ".", "?", "...", "-", "The answer is correct.", "I do not know."]
STRAYS += ["answer", "Thinking:", "None"]

LEARNING_RATE = 2e-3  # AdamW: embeddings, norms, biases, output
MUON_LEARNING_RATE = 8e-3  # Muon: matrices; learns in fewer steps
EARLY_WEIGHT = 0.3  # of the verdict right after the answer


@dataclass(frozen=True)
class Claim:
    """A question with an answer that may be wrong. `truth` is None where the right one is not to be learnt here."""

    problem: str
    answer: str
    truth: str | None

    @property
    def right(self) -> bool:
        return self.answer == self.truth


def wrong_answer(rng: random.Random, kind: str, solution: str) -> str:
    """Another answer of the same kind, now and then a stray one."""
    if rng.random() < STRAY_SHARE:
        words = [a for answers in shapes.ANSWERS.values() for a in answers]
        things = [f"{c} {s}" for c in shapes.COLOURS for s in shapes.SHAPES]
        stray = rng.choice([*words, *things, *STRAYS])
        if stray != solution:
            return stray
    return rng.choice([a for a in shapes.ANSWERS[kind] if a != solution])


def wrong_caption(rng: random.Random, caption: str) -> str:
    """The caption with one colour or one shape exchanged."""
    words = caption.replace(",", " ,").split()
    i = rng.choice([i for i, word in enumerate(words) if word != ","])
    names = shapes.COLOURS if words[i] in shapes.COLOURS else shapes.SHAPES
    words[i] = rng.choice([name for name in names if name != words[i]])
    return " ".join(words).replace(" ,", ",")


def claims(rng: random.Random, rows: list[dict], questions: int = QUESTIONS) -> list[Claim]:
    """Claims about one image; right and wrong ones of a question stand side by side."""
    caption = rows[0]["solution"]
    found = [Claim(shapes.CAPTION_QUESTION, caption, caption)]
    if rng.random() < 0.5:
        found.append(Claim(shapes.CAPTION_QUESTION, wrong_caption(rng, caption), None))
    # Weighted sampling without replacement (Efraimidis and Spirakis, 2006).
    asked = [(shapes.question_kind(row["problem"]) or "", row) for row in rows[1:]]
    asked.sort(key=lambda item: rng.random() ** (1 / WEIGHTS[item[0]]))
    for kind, row in asked[-questions:]:
        problem, solution = row["problem"], row["solution"]
        found += [Claim(problem, solution, solution), Claim(problem, wrong_answer(rng, kind, solution), solution)]
    return found


def by_image(rows: Iterable[dict]) -> list[list[dict]]:
    """Rows of the split `judge`, a list an image; the caption comes first."""
    groups = (list(group) for _, group in groupby(rows, key=lambda row: row["images"][0]))
    return [group for group in groups if len(group) > 1]


@dataclass(frozen=True)
class Branch:
    """A claim's tokens after the shared prefix; the answer's are `ids[start:end]`, `ids[end]` closes it."""

    ids: list[int]
    start: int
    end: int


@dataclass
class Targets:
    """Where in a flattened batch something is to be predicted, and what: flat positions and token ids."""

    at: list[int]
    ids: list[int]

    def loss(self, model, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean cross-entropy, logits [targets, V]); hidden: [B * L, H]."""
        logits = model.lm_head(hidden[torch.tensor(self.at)])
        return F.cross_entropy(logits, torch.tensor(self.ids)), logits


class Packer:
    """Packs claims about images of one size: the prompt's beginning with the image once, then a branch a claim."""

    def __init__(self, processor, model):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.yes, self.no = (self.tokenizer.encode(word)[0] for word in ("Yes", "No"))  # as the judge is read
        side = 2 * shapes.CELL // processor.image_processor.patch_size
        self.grid = torch.tensor([[1, side, side]])
        a, b = (self._tokens(*claim)[0] for claim in (("How", "1"), ("What", "red")))
        self.shared = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
        self.prefix = torch.tensor([a[: self.shared]])
        # [3, shared + 1]: time, height, width; the last is that of a branch's first token
        self.positions = prompt_positions(model.model, self.prefix[0].tolist(), self.grid)
        self._branches: dict[tuple[str, str], Branch] = {}

    def _tokens(self, problem: str, answer: str) -> tuple[list[int], list[tuple[int, int]], str]:
        messages = judge_messages(problem, answer)
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pad, merged = self.processor.image_token, self.processor.image_processor.merge_size**2
        text = text.replace(pad, pad * (int(self.grid.prod()) // merged))
        found = self.tokenizer(text, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"], text

    def branch(self, problem: str, answer: str) -> Branch:
        """The tokens of a claim. Answers are words without control characters, so quoting keeps them as they are."""
        if (problem, answer) not in self._branches:
            ids, offsets, text = self._tokens(problem, answer)
            first = text.rindex(f'"{answer}"') + 1  # characters
            start = next(i for i, (begin, _) in enumerate(offsets) if begin >= first)
            end = next(i for i, (begin, _) in enumerate(offsets) if begin >= first + len(answer))
            k = self.shared
            self._branches[problem, answer] = Branch(ids[k:], start - k, end - k)
        return self._branches[problem, answer]

    def pack(self, images: torch.Tensor, groups: list[list[Claim]]) -> tuple[dict, Targets, Targets, Targets]:
        """(the model's inputs, targets of the words, of the verdicts after the answer, of the verdicts).

        images: pixel values, [patches of all images, patch dimension].
        """
        packed = [[self.branch(c.problem, c.answer) for c in group] for group in groups]
        length = self.shared + max(sum(len(b.ids) for b in branches) for branches in packed)
        rows = len(groups)
        ids = torch.full((rows, length), self.tokenizer.pad_token_id)
        owner = torch.full((rows, length), -1)  # 0: the prefix, n: the n-th branch, -1: padding
        steps = torch.zeros(rows, length, dtype=torch.long)  # text positions after the prefix
        ids[:, : self.shared], owner[:, : self.shared] = self.prefix, 0
        words, early, verdicts = Targets([], []), Targets([], []), Targets([], [])
        for row, (group, branches) in enumerate(zip(groups, packed)):
            at = self.shared
            for number, (claim, branch) in enumerate(zip(group, branches), 1):
                here = slice(at, at + len(branch.ids))
                ids[row, here], owner[row, here] = torch.tensor(branch.ids), number
                steps[row, here] = torch.arange(len(branch.ids))
                flat = row * length + at
                verdict = self.yes if claim.right else self.no
                if claim.right:
                    words.at += range(flat + branch.start - 1, flat + branch.end - 1)
                    words.ids += branch.ids[branch.start : branch.end]
                elif claim.truth is not None:
                    words.at.append(flat + branch.start - 1)
                    words.ids.append(self.tokenizer.encode(claim.truth)[0])
                early.at.append(flat + branch.end)
                early.ids.append(verdict)
                verdicts.at.append(flat + len(branch.ids) - 1)
                verdicts.ids.append(verdict)
                at = here.stop
        positions = (self.positions[0, -1] + steps).expand(3, -1, -1).clone()
        positions[:, :, : self.shared] = self.positions[:, None, :-1]
        sees = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)  # [B, query, key]
        sees &= torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask[:, None],  # [B, 1, L, L]
            "position_ids": positions,  # [3, B, L]
            "pixel_values": images,
            "image_grid_thw": self.grid.expand(rows, -1),
        }
        return inputs, words, early, verdicts


def pixel_values(processor, pngs: list[bytes]) -> torch.Tensor:
    """[images, patches, patch dimension]"""
    images = [Image.open(io.BytesIO(png)) for png in pngs]
    values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return values.view(len(images), -1, values.shape[-1])


def train(model, processor, groups: list[list[dict]], *, steps: int, seed: int) -> None:
    """Train `model` in place on `groups` (`by_image`)."""
    rng = random.Random(f"judge/{seed}")
    packer = Packer(processor, model)
    easy = [group for group in groups if "," not in group[0]["solution"]]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _warm_cosine(step, steps)) for o in optimizers]
    model.train()
    with console.progress("judge", steps) as bar:
        for step in range(steps):
            chosen = rng.choices(easy if step < EASY_SHARE * steps else groups, k=IMAGES)
            images = pixel_values(processor, [group[0]["images"][0] for group in chosen]).flatten(0, 1)
            inputs, words, early, verdicts = packer.pack(images, [claims(rng, group) for group in chosen])
            hidden = model.model(**inputs).last_hidden_state.flatten(0, 1)
            loss, logits = verdicts.loss(model, hidden)
            loss = loss + words.loss(model, hidden)[0] + EARLY_WEIGHT * early.loss(model, hidden)[0]
            loss = loss + _order_loss(logits[:, packer.yes] - logits[:, packer.no], verdicts, packer)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            bar.advance(1, f"loss {loss.item():.3f}")
    model.eval()


def _warm_cosine(step: int, steps: int, warmup: int = 20) -> float:
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / max(1, steps)))


def _order_loss(scores: torch.Tensor, verdicts: Targets, packer: Packer) -> torch.Tensor:
    """A right claim and the wrong one after it differ in the answer alone: Bradley-Terry, as reward models have it.

    scores: log-odds of Yes, [claims].
    """
    pairs = [i for i, two in enumerate(zip(verdicts.ids, verdicts.ids[1:])) if two == (packer.yes, packer.no)]
    return -F.logsigmoid(scores[pairs] - scores[[i + 1 for i in pairs]]).mean()
