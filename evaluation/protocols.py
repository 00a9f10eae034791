"""Three ways to ask a compressed cache, exactly.

In every protocol a prompt is prefilled exactly and compressed as a real run would compress it; then further tokens are
fed at their true positions, and the answer is decoded greedily. Every answer token, the first too, is read from the
compressed cache, and at a budget of 1.0 the result is that of plain generation.

- ``aware``: the prompt is context, question and the opening of the assistant's turn, as in ``generate``. Its last token
  is then fed again at its own position, and its entry in the cache is hidden from there on, so that no token counts
  twice. (Where a method merged other entries into that entry it stays visible: hiding it would lose them.)
- ``blind``: the prompt is the context. The question and the opening are fed. This is the cached document: nothing about
  the question is known when the cache is made.
- ``second``: the prompt is context, another question about it, and the opening. That question's right answer is fed,
  then the case's question as a new user turn and its opening. This is the second turn of a chat. The first answer is
  given rather than generated, so that all methods read the same tokens.

The scored question is the same in all three. An unlabelled prompt has only ``aware``. What is fed after the compression
comes on top of the budget. Texts are rendered by the model's chat template; a prompt is the longest common token prefix
of its own rendering and that of the whole conversation.

Why ``aware`` includes the opening: the row that retrieves the answer is the last one. A prompt that ends with the
question is compressed without ever having seen that row attend, which is a different, much harder problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmm.errors import InputError
from flowmm.evaluation.suite import Case, Message
from flowmm.models import LoadedModel, visual_mask


@dataclass(frozen=True)
class Conversations:
    """What is compressed and what is asked in all; `opened`: the compressed part ends with an assistant's opening.

    `fed_again` tokens at the prompt's end are fed once more after the compression.
    """

    compressed: list[Message]
    whole: list[Message]
    opened: bool
    fed_again: int = 0


@dataclass(frozen=True)
class Trial:
    """A case under a protocol, as tokens.

    Attributes:
        inputs: model inputs of the compressed prompt, ``[1, L]`` each, with its images.
        continuation: ``[1, q]`` ids fed after the compression.
        prompt_positions: ``[3, 1, L]`` M-RoPE positions.
        positions: ``[3, 1, q]`` of the continuation.
        fed_again: the continuation starts with so many of the prompt's last tokens.
    """

    inputs: dict[str, Tensor]
    continuation: Tensor
    prompt_positions: Tensor
    positions: Tensor
    fed_again: int

    @property
    def prompt_length(self) -> int:
        return self.inputs["input_ids"].shape[1]


def _aware(case: Case) -> Conversations:
    conversation = case.asking(case.question)
    return Conversations(conversation, conversation, opened=True, fed_again=1)


def _blind(case: Case) -> Conversations:
    return Conversations(case.context_messages(), case.asking(_asked(case)), opened=False)


def _second(case: Case) -> Conversations:
    if case.earlier is None:
        raise InputError(f"{case.name}: the protocol 'second' needs an earlier question, and this suite has none")
    question, answer = case.earlier
    first = case.asking(question)
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": _asked(case)}]
    return Conversations(first, [*first, *turns], opened=True)


def _asked(case: Case) -> str:
    if not case.question:
        raise InputError(f"{case.name}: only the protocol 'aware' fits a prompt without a question of its own")
    return case.question


PROTOCOLS: dict[str, Callable[[Case], Conversations]] = {"aware": _aware, "blind": _blind, "second": _second}


def build_trial(model: LoadedModel, case: Case, protocol: str) -> Trial:
    """Tokens of a case under a protocol.

    Raises:
        InputError: unknown protocol, one that the case does not fit, or images behind the compressed prompt.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    chat = PROTOCOLS[protocol](case)
    ids = model.build_inputs(chat.compressed, add_generation_prompt=chat.opened)["input_ids"][0]
    inputs = model.build_inputs(chat.whole)
    cut = _common_prefix(ids.tolist(), inputs["input_ids"][0].tolist())
    continuation = inputs["input_ids"][:, cut - chat.fed_again :]
    if bool(visual_mask(model.model.config, continuation).any()):
        raise InputError(f"{case.name}: images behind the compressed prompt are not supported; put them in front")
    prompt = {name: tensor[:, :cut] if name in _PER_TOKEN else tensor for name, tensor in inputs.items()}
    positions = _positions(model, inputs)
    return Trial(prompt, continuation, positions[..., :cut], positions[..., cut - chat.fed_again :], chat.fed_again)


_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    different = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))


def _positions(model: LoadedModel, inputs: dict[str, Tensor]) -> Tensor:
    """``[3, 1, L + q]``; given to every forward call, because a model keeps the offsets of its latest prompt only."""
    ids = inputs["input_ids"]
    if "image_grid_thw" not in inputs:
        return torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
    host: Any = model.model.model
    positions, _ = host.get_rope_index(
        ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )
    return positions
