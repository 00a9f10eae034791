"""What the vision tower is taught directly: to write the words for what each visual token shows."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import Qwen2Tokenizer

from flowmm.pocket import tasks
from flowmm.pocket.batches import TOKENS_PER_SIDE

_SAID = {"shape": tasks.SHAPES, "colour": tuple(tasks.COLOURS), "digit": tuple("0123456789")}


def object_labels(pictures: list[tasks.Picture]) -> torch.Tensor:
    """Return ``[N, side, side, 3]``: shape, colour and digit of the object in whose cell a token lies, else -100."""
    tokens_per_cell = TOKENS_PER_SIDE * tasks.CELL // tasks.IMAGE_SIZE
    labels = np.full((len(pictures), TOKENS_PER_SIDE, TOKENS_PER_SIDE, 3), -100)
    for i, picture in enumerate(pictures):
        for item in picture.objects:
            row, column = (tokens_per_cell * place for place in item.cell)
            digit = -100 if item.digit is None else item.digit
            shown = tasks.SHAPES.index(item.shape), list(tasks.COLOURS).index(item.colour), digit
            labels[i, row : row + tokens_per_cell, column : column + tokens_per_cell] = shown
    return torch.from_numpy(labels)


def arrival_labels(scenes: list[tasks.Scene]) -> torch.Tensor:
    """Return ``[N, side, side]`` bool: tokens of the object that only the second picture of a pair shows."""
    tokens_per_cell = TOKENS_PER_SIDE * tasks.CELL // tasks.IMAGE_SIZE
    arrived = {id(pair.after): pair.arrived for scene in scenes for pair in scene.pairs}
    pictures = [picture for scene in scenes for picture in scene.pictures]
    labels = torch.zeros(len(pictures), TOKENS_PER_SIDE, TOKENS_PER_SIDE, dtype=torch.bool)
    for i, picture in enumerate(pictures):
        if item := arrived.get(id(picture)):
            row, column = (tokens_per_cell * place for place in item.cell)
            labels[i, row : row + tokens_per_cell, column : column + tokens_per_cell] = True
    return labels


def noticing_loss(
    noticed: torch.Tensor, labels: torch.Tensor, table: torch.Tensor, tokenizer: Qwen2Tokenizer
) -> tuple[torch.Tensor, float]:
    """Have the tokens of an arrived object, and no others, say ``change`` to the layers that look things up.

    Takes ``noticed [N, tokens, hidden]``, ``labels`` of ``arrival_labels`` and ``table [vocabulary, hidden]``; returns
    the loss and the mean of the shares told right among arrived and other tokens.
    """
    word = table[tokenizer.encode("change")[-1]] + table[tokenizer.encode(" change")[-1]]
    scores, wanted = (noticed @ word * 4).flatten() - 2, labels.flatten()
    # Few tokens belong to arrived objects; both classes weigh the same.
    each = [
        binary_cross_entropy_with_logits(scores[chosen], wanted[chosen].float(), reduction="sum")
        / chosen.sum().clamp(min=1)
        for chosen in (wanted, ~wanted)
    ]
    told = [((scores > 0) == wanted)[chosen].float().mean().item() for chosen in (wanted, ~wanted)]
    return each[0] + each[1], sum(told) / 2


def naming_loss(
    embedded: torch.Tensor, labels: torch.Tensor, table: torch.Tensor, tokenizer: Qwen2Tokenizer
) -> tuple[torch.Tensor, dict[str, float]]:
    """Compare visual embeddings with the text embeddings of the words that name what they show.

    Takes ``embedded [N, tokens, hidden]``, ``labels`` of ``object_labels`` and ``table [vocabulary, hidden]``; returns
    the loss and the share named right per kind of word.
    """
    loss, logged = embedded.new_zeros(()), {}
    for kind, (name, words) in enumerate(_SAID.items()):
        # The last token of a digit after a space is the bare digit: the sum then counts it twice, which does no harm.
        rows = [table[tokenizer.encode(word)[-1]] + table[tokenizer.encode(" " + word)[-1]] for word in words]
        scores = (embedded @ torch.stack(rows).T * 4).flatten(0, -2)
        wanted = labels[..., kind].flatten()
        # A sum over few labels: a batch without digits must give 0, not the mean of nothing.
        loss = loss + cross_entropy(scores, wanted, reduction="sum") / (wanted >= 0).sum().clamp(min=1)
        logged[name] = (scores.argmax(-1) == wanted)[wanted >= 0].float().mean().item()
    return loss, logged
