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

The scored question is the same in all three. For a prompt without labels it is the text that ends the last user turn;
``blind`` needs something in front of that text (images, or earlier turns), and ``second`` an earlier user turn with its
recorded answer, which is what is fed. What is fed after the compression comes on top of the budget. Texts are rendered
by the model's chat template; a prompt is the longest common token prefix of its own rendering and that of the whole
conversation.

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
    context = case.context_messages()
    if not case.question or all(message["role"] == "system" for message in context):
        raise InputError(
            "the protocol 'blind' compresses what stands in front of the last user text and feeds that text "
            "afterwards; it needs a text at the end of the last user turn, and images or earlier turns in front of it"
        )
    return Conversations(context, case.asking(case.question), opened=False)


def _second(case: Case) -> Conversations:
    if case.earlier is not None:
        question, answer = case.earlier
        first = case.asking(question)
        turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": case.question}]
        return Conversations(first, [*first, *turns], opened=True)
    if [message["role"] for message in case.history[-2:]] != ["user", "assistant"]:
        raise InputError(
            "the protocol 'second' compresses a first question and feeds its answer and another question; it needs a "
            'suite with two questions per context, or prompts as {"messages": [...]} that end with the turns user, '
            "assistant, user"
        )
    return Conversations(list(case.history[:-1]), case.asking(case.question), opened=True)


PROTOCOLS: dict[str, Callable[[Case], Conversations]] = {"aware": _aware, "blind": _blind, "second": _second}


def conversations(case: Case, protocol: str) -> Conversations:
    """What of a case is compressed under a protocol, and what is asked in all.

    Raises:
        InputError: unknown protocol, or one that the case does not fit.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    try:
        return PROTOCOLS[protocol](case)
    except InputError as error:
        raise InputError(f"{case.name}: {error}") from error


def build_trial(model: LoadedModel, case: Case, protocol: str) -> Trial:
    """Tokens of a case under a protocol.

    Raises:
        InputError: see :func:`conversations`; or images behind the compressed prompt.
    """
    chat = conversations(case, protocol)
    try:
        return replay.build_trial(model, chat)
    except InputError as error:
        raise InputError(f"{case.name}: {error}") from error
