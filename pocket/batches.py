"""Pack generated scenes for training: one context, many independent questions behind it, all in one row.

A question sees the context and itself, at the positions it would have if it were the only one. So every packed
question is exactly one single-question prompt, at a fraction of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from transformers import Qwen2Tokenizer

from flowmm.pocket import tasks
from flowmm.pocket.architecture import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

GRID = tasks.IMAGE_SIZE // PATCH_SIZE
TOKENS_PER_SIDE = GRID // MERGE_SIZE
TOKENS_PER_IMAGE = TOKENS_PER_SIDE**2
_PADDING = -1


@dataclass(frozen=True)
class Batch:
    """Packed rows of token ids ``[B, L]`` with their ``positions [3, B, L]``.

    ``mask [B, 1, L, L]`` is True where a token may be seen, ``blind`` the same without the context for questions.
    ``images [N, 32, 32, 3]`` are uint8 in prompt order. ``targets [B, L]`` is the next token where it is scored, else
    -100, and ``asked [B, L]`` the index into ``tasks.TASKS`` of the question it answers, else -1. The first ``shared``
    tokens of every row are context.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    blind: torch.Tensor
    images: np.ndarray
    targets: torch.Tensor
    asked: torch.Tensor
    shared: int


class Packer:
    """Turns scenes and questions into token rows exactly as the chat template would."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self._encode = cache(lambda text: tuple(tokenizer.encode(text)))
        (self.image_token,) = tokenizer.encode("<|image_pad|>")
        (self.pad_token,) = tokenizer.encode("<|endoftext|>")

    def context(self, scene: tasks.Scene) -> tuple[list[int], np.ndarray]:
        """Return the token ids up to the question and their positions ``[3, L]``."""
        ids = list(self._encode("<|im_start|>user\n"))
        positions = [np.tile(np.arange(len(ids)), (3, 1))]
        start = len(ids)
        for part in scene.content():
            if part["type"] == "image":
                ids += self._encode("<|vision_start|>") + (self.image_token,) * TOKENS_PER_IMAGE
                ids += self._encode("<|vision_end|>")
                rows, columns = np.divmod(np.arange(TOKENS_PER_IMAGE), TOKENS_PER_SIDE)
                inside = start + 1 + np.stack([np.zeros_like(rows), rows, columns])
                after = start + 1 + TOKENS_PER_SIDE
                positions += [np.full((3, 1), start), inside, np.full((3, 1), after)]
                start = after + 1
            else:
                text = self._sentence(part["text"])
                ids += text
                positions.append(np.tile(start + np.arange(len(text)), (3, 1)))
                start += len(text)
        return ids, np.concatenate(positions, axis=1)

    def _sentence(self, text: str) -> list[int]:
        """Encode word by word, so that the cache holds words rather than whole texts."""
        first, *rest = text.split(" ")
        return [token for word in (first, *(" " + word for word in rest)) for token in self._encode(word)]

    def turn(self, question: str, answer: str, opening: str) -> tuple[tuple[int, ...], int]:
        """Return the ids of one question with its answer, and at which of them the answer begins."""
        asked = self._encode(f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n")
        return asked + self._encode(answer) + self._encode("<|im_end|>"), len(asked)

    def row(self, scene: tasks.Scene, branches: list[list[Asked]]) -> _Row:
        """Return a context with one branch per list; later questions of a branch come after the earlier answers."""
        ids, positions = self.context(scene)
        row = _Row(ids, positions, [0] * len(ids), [-100] * len(ids), [-1] * len(ids))
        for number, branch in enumerate(branches, start=1):
            openings = ["\n"] + ["\n<|im_start|>user\n"] * (len(branch) - 1)
            turns = [
                (*self.turn(*asked, opening), task) for (task, asked), opening in zip(branch, openings, strict=True)
            ]
            row.append_branch(turns, number)
        return row


Asked = tuple[int, tasks.Question]
"""Index of a task in ``tasks.TASKS`` and one of its questions."""


def draw_branch(scene: tasks.Scene, rng: np.random.Generator, shares: tuple[float, ...], turns: int) -> list[Asked]:
    """Draw ``turns`` questions about a scene, tasks by ``shares``; tasks it has no question for are drawn again."""
    branch: list[Asked] = []
    while len(branch) < turns:
        task = int(rng.choice(len(shares), p=shares))
        if asked := tasks.QUESTIONS[tasks.TASKS[task]](scene, rng):
            branch.append((task, asked))
    return branch


@dataclass
class _Row:
    ids: list[int]
    positions: np.ndarray
    branches: list[int]
    targets: list[int]
    asked: list[int]

    def append_branch(self, turns: list[tuple], branch: int) -> None:
        start = int(self.positions[0, self.branches.count(0) - 1]) + 1
        for ids, answer_at, task in turns:
            scored = range(answer_at - 1, len(ids) - 1)
            self.ids += ids
            self.branches += [branch] * len(ids)
            self.targets += [ids[i + 1] if i in scored else -100 for i in range(len(ids))]
            self.asked += [task if i in scored else -1 for i in range(len(ids))]
            self.positions = np.append(self.positions, np.tile(start + np.arange(len(ids)), (3, 1)), axis=1)
            start += len(ids)


def pack(rows: list[_Row], scenes: list[tasks.Scene], pad_token: int) -> Batch:
    """Pad rows to one length and build the mask of who may see whom."""
    length = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([line + [fill] * (length - len(line)) for line in values])

    branches = padded([row.branches for row in rows], _PADDING)
    query, key = branches[:, :, None], branches[:, None, :]
    mask = ((key == 0) | (key == query)) & torch.ones(length, length, dtype=torch.bool).tril()
    # The first token stays visible, as the sink that a question with nothing to find needs.
    hidden = (query > 0) & (key == 0) & (torch.arange(length) > 0)
    positions = np.stack([np.pad(row.positions, ((0, 0), (0, length - len(row.ids)))) for row in rows], axis=1)
    return Batch(
        ids=padded([row.ids for row in rows], pad_token),
        positions=torch.from_numpy(positions),
        mask=mask[:, None],
        blind=(mask & ~hidden)[:, None],
        images=np.stack([picture.pixels for scene in scenes for picture in scene.pictures]),
        targets=padded([row.targets for row in rows], -100),
        asked=padded([row.asked for row in rows], -1),
        shared=min(row.branches.count(0) for row in rows),
    )


def patches(images: np.ndarray) -> torch.Tensor:
    """Return the image processor's pixel values ``[N, GRID * GRID, 96]`` for uint8 ``images [N, side, side, 3]``."""
    scaled = torch.from_numpy(images).float().div(127.5).sub(1).permute(0, 3, 1, 2)
    n, side = len(images), TOKENS_PER_SIDE
    cut = scaled.reshape(n, 3, side, MERGE_SIZE, PATCH_SIZE, side, MERGE_SIZE, PATCH_SIZE)
    ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n, GRID * GRID, 3, 1, PATCH_SIZE, PATCH_SIZE)
    return ordered.expand(-1, -1, -1, TEMPORAL_PATCH_SIZE, -1, -1).reshape(n, GRID * GRID, -1)
