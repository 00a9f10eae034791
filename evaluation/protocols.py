"""Three ways to ask a compressed cache, exactly.

Every protocol names two conversations, *compressed* and *whole*. Both are rendered by the model's chat template, the
second with the opening of an assistant turn. Their longest common token prefix is the prompt: it is prefilled exactly
and then compressed. The rest of *whole* is fed afterwards, at its true positions, and the answer is decoded greedily.
So every answer token, the first too, is read from the compressed cache, nothing is fed twice, and at a budget of 1.0
the result is that of plain generation.

- ``aware``: compressed = context and question; whole = the same. The rest is the opening of the assistant's turn
  (Qwen2.5-VL: ``<|im_start|>assistant\\n``). The question is the last text of the prompt, so its tokens are proxies.
- ``blind``: compressed = context; whole = context and question. The rest is the question and the opening. This is the
  cached document: nothing about the question is known when the cache is made.
- ``second``: compressed = context and another question about it; whole = context, that question, its right answer, and
  the case's question as a new user turn. The rest starts with the opening of the first answer. This is the second turn
  of a chat. The first answer is given rather than generated, so that all methods read the same tokens.

The scored question is the same in all three. An unlabelled prompt has only ``aware``.
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

Conversations = tuple[list[Message], list[Message]]


@dataclass(frozen=True)
class Trial:
    """A case under a protocol, as tokens.

    Attributes:
        inputs: model inputs of the compressed prompt, ``[1, L]`` each, with its images.
        continuation: ``[1, q]`` ids fed after the compression.
        positions: ``[3, 1, L + q]`` M-RoPE positions of both.
    """

    inputs: dict[str, Tensor]
    continuation: Tensor
    positions: Tensor

    @property
    def prompt_length(self) -> int:
        return self.inputs["input_ids"].shape[1]


def _aware(case: Case) -> Conversations:
    return case.asking(case.question), case.asking(case.question)


def _blind(case: Case) -> Conversations:
    return case.context_messages(), case.asking(_asked(case))


def _second(case: Case) -> Conversations:
    if case.earlier is None:
        raise InputError(f"{case.name}: the protocol 'second' needs an earlier question, and this suite has none")
    question, answer = case.earlier
    compressed = case.asking(question)
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": _asked(case)}]
    return compressed, [*compressed, *turns]


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
    compressed, whole = PROTOCOLS[protocol](case)
    ids = model.build_inputs(compressed, add_generation_prompt=False)["input_ids"][0]
    inputs = model.build_inputs(whole)
    cut = _common_prefix(ids.tolist(), inputs["input_ids"][0].tolist())
    continuation = inputs["input_ids"][:, cut:]
    if bool(visual_mask(model.model.config, continuation).any()):
        raise InputError(f"{case.name}: images behind the compressed prompt are not supported; put them in front")
    prompt = {name: tensor[:, :cut] if name in _PER_TOKEN else tensor for name, tensor in inputs.items()}
    return Trial(prompt, continuation, _positions(model, inputs))


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
