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

from collections.abc import Callable

from flowmm.errors import InputError
from flowmm.evaluation.suite import Case
from flowmm.models import LoadedModel
from flowmm.runtime import replay
from flowmm.runtime.replay import Conversations, Trial


def _aware(case: Case) -> Conversations:
    conversation = case.asking(case.question)
    return Conversations(conversation, conversation, opened=True, fed_again=1)


def _blind(case: Case) -> Conversations:
    return Conversations(case.context_messages(), case.asking(_asked(case)), opened=False)


def _second(case: Case) -> Conversations:
    if case.earlier is None:
        raise InputError("the protocol 'second' needs an earlier question, and this suite has none")
    question, answer = case.earlier
    first = case.asking(question)
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": _asked(case)}]
    return Conversations(first, [*first, *turns], opened=True)


def _asked(case: Case) -> str:
    if not case.question:
        raise InputError("only the protocol 'aware' fits a prompt without a question of its own")
    return case.question


PROTOCOLS: dict[str, Callable[[Case], Conversations]] = {"aware": _aware, "blind": _blind, "second": _second}


def build_trial(model: LoadedModel, case: Case, protocol: str) -> Trial:
    """Tokens of a case under a protocol.

    Raises:
        InputError: unknown protocol, one that the case does not fit, or images behind the compressed prompt.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    try:
        return replay.build_trial(model, PROTOCOLS[protocol](case))
    except InputError as error:
        raise InputError(f"{case.name}: {error}") from error
