"""Train the pocket model: ``python -m flowmm.pocket.train [--out DIR] [--resume]``; the defaults made the weights.

Two stages. First the vision tower learns to write, at each visual token, the text embeddings of the shape and the
colour it shows. Then everything trains on packed scenes that grow from one image to full prompts. A run can begin with
an earlier checkpoint: ``--start DIR --at STEP``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from flowmm.pocket import tasks
from flowmm.pocket.architecture import MATCH_LAYERS, build_image_processor, build_model
from flowmm.pocket.batches import Batch, Packer, draw_branch, pack, patches
from flowmm.pocket.forward import Packed, visual_embeddings
from flowmm.pocket.muon import Muon
from flowmm.pocket.sight import arrival_labels, naming_loss, noticing_loss, object_labels
from flowmm.pocket.tokenizer import build_tokenizer

# How often the tasks of ``tasks.TASKS`` are asked: before there are pairs, when pairs are learned, and in the end.
FOUR = (0.2, 0.3, 0.2, 0.3, 0.0)
PAIRS_FIRST = (0.15, 0.15, 0.15, 0.15, 0.4)
FIVE = (0.22, 0.16, 0.2, 0.17, 0.25)
# Ranges of images, pairs, facts and fillers.
FULL_SIZE = ((10, 20), (3, 12), (4, 12), (2, 12))


@dataclass(frozen=True)
class Level:
    """One stage of the curriculum: the step it ends at, the sizes it draws from and how it trains.

    ``rate`` scales all learning rates, ``vision_rate`` the vision tower's on top; ``naming`` and ``noticing``
    weigh those losses;
    ``blind`` is how often questions see no context in one of the match layers; ``shares`` how often each task is asked.
    """

    until: int
    rows: int
    images: tuple[int, int]
    pairs: tuple[int, int]
    facts: tuple[int, int]
    fillers: tuple[int, int]
    rate: float = 1.0
    vision_rate: float = 1.0
    naming: float = 0.0
    noticing: float = 0.0
    blind: float = 0.0
    shares: tuple[float, ...] = FOUR


@dataclass(frozen=True)
class Recipe:
    """Every knob of the run that made the shipped weights."""

    seed: int = 0
    vision_steps: int = 600
    vision_images: int = 128
    steps: int = 1320
    vision_schedule: tuple[tuple[float, float], ...] = ((-1, 0.0), (29, 1.0), (420, 1.0), (600, 0.0))
    """The line of factors on the learning rates, by its corners (step, factor)."""
    schedule: tuple[tuple[float, float], ...] = (
        (-1, 0.0),
        (29, 1.0),
        (504, 1.0),
        (700, 20 / 216),
        (715, 0.6),
        (830, 0.0),
        (831, 0.02),
        (850, 0.8),
        (1120, 0.8),
        (1320, 0.01),
    )
    questions: int = 20
    second_turns: float = 0.2
    text_rates: tuple[float, float] = (0.01, 2e-3)
    """Learning rates of matrices (Muon) and of everything else (AdamW)."""
    vision_rates: tuple[tuple[float, float], tuple[float, float]] = ((0.005, 2e-3), (0.002, 2e-4))
    """The same for the vision tower: in its own stage, then in the stage that trains everything."""
    visual_norm: float = 1.5
    validate_every: int = 100
    validation_prompts: int = 64
    levels: tuple[Level, ...] = (
        Level(60, 20, (1, 2), (0, 0), (1, 4), (0, 1)),
        Level(100, 16, (2, 5), (0, 0), (2, 6), (0, 2)),
        Level(150, 16, (2, 5), (0, 0), (2, 6), (0, 2), rate=0.4),
        Level(300, 12, (4, 10), (0, 0), (3, 8), (1, 3), rate=0.4),
        Level(350, 12, (4, 10), (0, 0), (3, 8), (1, 3), rate=0.4, vision_rate=2.5, naming=0.3),
        Level(700, 10, (6, 19), (0, 0), (4, 8), (1, 4), rate=0.4, vision_rate=2.5, naming=0.3),
        Level(830, 10, (6, 19), (0, 0), (4, 8), (1, 4), rate=0.4, naming=0.3, blind=0.6),
        Level(960, 8, (2, 5), (1, 4), (1, 4), (0, 2), rate=0.4, naming=0.3, noticing=0.5, shares=PAIRS_FIRST),
        Level(1040, 8, (4, 10), (2, 6), (3, 8), (1, 4), rate=0.4, naming=0.3, noticing=0.5, shares=PAIRS_FIRST),
        Level(1_000_000, 6, *FULL_SIZE, rate=0.4, naming=0.3, noticing=0.3, blind=0.35, shares=FIVE),
    )


class Trainer:
    """Model, optimisers and step counter; all data follows from the seed and the step, so resuming is exact."""

    def __init__(self, recipe: Recipe, tokenizer: Qwen2Tokenizer) -> None:
        self.recipe = recipe
        self.packer = Packer(tokenizer)
        self.model = build_model(tokenizer, recipe.seed)
        self.packed = Packed(self.model)
        self.tokenizer = tokenizer
        self.step = 0
        self.tokens = 0
        groups = self._groups()
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon([{"params": groups["vision matrices"]}, {"params": groups["text matrices"]}], lr=0.0),
            torch.optim.AdamW(
                [{"params": groups["vision vectors"]}, {"params": groups["text vectors"]}],
                lr=0.0,
                betas=(0.9, 0.95),
                weight_decay=0.0,
            ),
        ]

    def _groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Matrices go to Muon; AdamW takes vectors, embeddings and the merger's last layer, which sets visual norms."""
        groups = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            special = parameter.ndim != 2 or "embed_tokens" in name or "merger.mlp.2" in name
            tower = "vision" if ".visual." in name else "text"
            groups[f"{tower} {'vectors' if special else 'matrices'}"].append(parameter)
        return groups

    def advance(self) -> dict[str, float]:
        """Make one optimiser step of whichever stage the step counter is in; return what to log."""
        vision = self.step < self.recipe.vision_steps
        self._set_rates(vision)
        loss, logged = self._vision_loss() if vision else self._text_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss.item(), **logged}

    def _set_rates(self, vision: bool) -> None:
        """Follow the stage's schedule; the vision tower is slow once its outputs mean something."""
        recipe = self.recipe
        done = self.step if vision else self.step - recipe.vision_steps
        steps, heights = zip(*(recipe.vision_schedule if vision else recipe.schedule), strict=True)
        factor = max(0.01, float(np.interp(done, steps, heights)))
        level = None if vision else self._level(done)
        factor *= level.rate if level else 1.0
        tower = [rate * (level.vision_rate if level else 1.0) for rate in recipe.vision_rates[level is not None]]
        for optimiser, rates in zip(self.optimisers, zip(tower, recipe.text_rates, strict=True), strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _vision_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        rng = tasks.stream("train", "vision", self.step, self.recipe.seed)
        pictures: list[tasks.Picture] = []
        while len(pictures) < self.recipe.vision_images:
            pictures += tasks.draw_scene(rng, "train", images=8, pairs=0, facts=0, fillers=0).pictures
        embedded = visual_embeddings(self.model, patches(np.stack([picture.pixels for picture in pictures])))
        norms = embedded.norm(dim=-1)
        loss, logged = naming_loss(
            embedded, object_labels(pictures), self.model.lm_head.weight.detach(), self.tokenizer
        )
        loss = loss + 0.1 * (norms - self.recipe.visual_norm).square().mean()
        return loss, {**logged, "norm": norms.mean().item()}

    def _text_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        step = self.step - self.recipe.vision_steps
        scenes, batch = self.batch(step)
        logits, visual, noticed = self.packed.fast(batch, self.packer.image_token, self._blind_layer(step))
        self.tokens += batch.ids.numel()
        scored, asked = batch.targets[batch.targets >= 0], batch.asked[batch.targets >= 0]
        norms = visual.float().norm(dim=-1)
        too_long = (norms - self.recipe.visual_norm).clamp(min=0).square().mean()
        loss = cross_entropy(logits.float(), scored) + 0.05 * too_long
        right = (logits.argmax(-1) == scored).float()
        content = scored != self.tokenizer.eos_token_id
        logged = {name: right[(asked == i) & content].mean().item() for i, name in enumerate(tasks.TASKS)}
        logged |= {"norm": norms.mean().item(), "length": float(batch.ids.shape[1])}
        if weight := self._level(step).naming:
            labels = object_labels([picture for scene in scenes for picture in scene.pictures])
            named, shares = naming_loss(visual.float(), labels, self.model.lm_head.weight.detach(), self.tokenizer)
            loss, logged = loss + weight * named, logged | shares
        if weight := self._level(step).noticing:
            table = self.model.lm_head.weight.detach()
            missed, told = noticing_loss(noticed.float(), arrival_labels(scenes), table, self.tokenizer)
            loss, logged = loss + weight * missed, logged | {"noticed": told}
        return loss, logged

    def _blind_layer(self, step: int) -> int | None:
        """Draw the layer in which questions see no context, so that finding things does not hang on one layer."""
        rng = tasks.stream("train", "blind", step, self.recipe.seed)
        return int(rng.choice(MATCH_LAYERS)) if rng.random() < self._level(step).blind else None

    def _level(self, step: int) -> Level:
        return next(level for level in self.recipe.levels if step < level.until)

    def batch(self, step: int) -> tuple[list[tasks.Scene], Batch]:
        """Return the scenes of a step and the packed training batch made of them."""
        recipe = self.recipe
        rng = tasks.stream("train", "packed", step, recipe.seed)
        level = self._level(step)
        ranges = (level.images, level.pairs, level.facts, level.fillers)
        images, pairs, facts, fillers = (int(rng.integers(low, high + 1)) for low, high in ranges)
        scenes = [tasks.draw_scene(rng, "train", images, min(pairs, images), facts, fillers) for _ in range(level.rows)]
        rows = []
        for scene in scenes:
            turns = 1 + (rng.random(recipe.questions) < recipe.second_turns)
            rows.append(self.packer.row(scene, [draw_branch(scene, rng, level.shares, int(n)) for n in turns]))
        return scenes, pack(rows, scenes, self.packer.pad_token)

    def save_state(self, path: Path) -> None:
        """Write weights, optimiser moments and the step to one safetensors file, atomically."""
        tensors = {f"model.{name}": value for name, value in self.model.named_parameters()}
        for number, optimiser in enumerate(self.optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{number}.{index}.{key}": value for key, value in state.items()}
        part = path.with_suffix(".part")
        meta = {"step": str(self.step), "tokens": str(self.tokens)}
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, part, metadata=meta)
        os.replace(part, path)

    def load_weights(self, directory: Path, step: int) -> None:
        """Take a checkpoint's weights, words by name, and go on at ``step`` with fresh optimisers.

        Words that the checkpoint does not know keep their start.
        """
        loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        known, own = Qwen2Tokenizer.from_pretrained(directory).get_vocab(), self.tokenizer.get_vocab()
        table, rows = loaded.lm_head.weight, self.model.lm_head.weight
        shared = sorted(known.keys() & own.keys())
        weights = {name: value for name, value in loaded.named_parameters() if value is not table}
        self.model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            rows[[own[word] for word in shared]] = table[[known[word] for word in shared]]
        self.step = step

    def load_state(self, path: Path) -> None:
        """Continue from ``save_state``; training then goes on exactly as if it had not stopped."""
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in self.optimisers]
        with safe_open(path, framework="pt") as file:
            self.step, self.tokens = int(file.metadata()["step"]), int(file.metadata()["tokens"])
            parameters = dict(self.model.named_parameters())
            for name in file.keys():  # noqa: SIM118 (a safetensors file cannot be iterated)
                if name.startswith("model."):
                    parameters[name.removeprefix("model.")].data.copy_(file.get_tensor(name))
                else:
                    _, number, index, key = name.split(".")
                    states[int(number)].setdefault(int(index), {})[key] = file.get_tensor(name)
        for optimiser, state in zip(self.optimisers, states, strict=True):
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def validation_accuracy(trainer: Trainer, task: str) -> float:
    """Return the exact-match share on validation prompts with one question each, teacher-forced over the answer."""
    packer, recipe = trainer.packer, trainer.recipe
    right = []
    for start in range(0, recipe.validation_prompts, 8):
        drawn = [tasks.asked_scene(task, "validation", start + i, recipe.seed) for i in range(8)]
        rows = [packer.row(scene, [[(tasks.TASKS.index(task), asked)]]) for scene, asked in drawn]
        batch = pack(rows, [scene for scene, _ in drawn], packer.pad_token)
        with torch.no_grad():
            logits = trainer.packed.fast(batch, packer.image_token).logits
        scored = batch.targets >= 0
        wrong = torch.zeros_like(batch.targets, dtype=torch.bool)
        wrong[scored] = logits.argmax(-1) != batch.targets[scored]
        right.append(~wrong.any(1))
    return torch.cat(right).float().mean().item()


def save_checkpoint(trainer: Trainer, directory: Path) -> None:
    """Write a normal checkpoint directory: bf16 weights, tokenizer, image processor, generation defaults."""
    tokenizer, model = trainer.tokenizer, trainer.model
    shipped = Qwen2_5_VLForConditionalGeneration(model.config).to(torch.bfloat16)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=8,
    )
    shipped.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    build_image_processor().save_pretrained(directory)


def run(trainer: Trainer, out: Path, state: Path) -> None:
    """Train to the recipe's last step, logging to stderr and ``state``'s directory; checkpoint at each validation."""
    recipe = trainer.recipe
    started = time.monotonic()
    while trainer.step < recipe.vision_steps + recipe.steps:
        logged = trainer.advance()
        if trainer.step % 10 == 0:
            _report({"step": trainer.step, "seconds": time.monotonic() - started, **logged})
        if trainer.step % recipe.validate_every == 0:
            if trainer.step > recipe.vision_steps:
                accuracy = {f"validation {task}": validation_accuracy(trainer, task) for task in tasks.TASKS}
                _report({"step": trainer.step, "tokens": trainer.tokens, **accuracy})
            save_checkpoint(trainer, out)
            trainer.save_state(state)
    save_checkpoint(trainer, out)
    trainer.save_state(state)


def _report(values: dict[str, float]) -> None:
    print(json.dumps({name: round(value, 4) for name, value in values.items()}), file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the training run."""
    parser = argparse.ArgumentParser(prog="python -m flowmm.pocket.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint", help="checkpoint directory")
    parser.add_argument("--state", type=Path, help="where to keep the training state (default: OUT.state.safetensors)")
    parser.add_argument("--resume", action="store_true", help="continue from the training state")
    parser.add_argument("--start", type=Path, metavar="DIR", help="begin with the weights of this checkpoint")
    parser.add_argument("--at", type=int, default=0, help="step to begin at, with --start")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps after the vision stage")
    parser.add_argument("--vision-steps", type=int, default=Recipe.vision_steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = Recipe(seed=options.seed, steps=options.steps, vision_steps=options.vision_steps)
    trainer = Trainer(recipe, build_tokenizer())
    state = options.state or options.out.with_name(options.out.name + ".state.safetensors")
    if options.start is not None:
        trainer.load_weights(options.start, options.at)
    if options.resume:
        trainer.load_state(state)
    run(trainer, options.out, state)


if __name__ == "__main__":
    main()
