"""What is asked: cases with one exact answer each from the pocket generator, or prompts without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowmm.errors import InputError
from flowmm.pocket import tasks
from flowmm.pocket.tasks import TASKS, Question, Scene, asked_scene, stream

if TYPE_CHECKING:
    from flowmm.profiler import CalibrationSample

POCKET = "pocket"
UNLABELLED = "fidelity"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One measured prompt.

    Attributes:
        suite, split, task, seed, index: what identifies the case.
        context: content parts of the last user turn in front of the question.
        question: the text that ends the last user turn, empty where an image does.
        answer: the only right answer, or ``None``.
        earlier: another question about the same context with its answer, for the ``second`` protocol.
        history: turns before the one that holds the context.
        separator: what stands between context and question.
    """

    suite: str
    split: str
    task: str
    seed: int
    index: int
    context: tuple[Mapping[str, Any], ...]
    question: str = ""
    answer: str | None = None
    earlier: Question | None = None
    history: tuple[Message, ...] = ()
    separator: str = "\n"

    @property
    def name(self) -> str:
        return f"{self.suite}:{self.split}:{self.task}:{self.index}"

    def context_messages(self) -> list[Message]:
        """The conversation up to and including the context."""
        return [*self.history, {"role": "user", "content": list(self.context)}] if self.context else [*self.history]

    def asking(self, question: str) -> list[Message]:
        """The conversation up to and including `question` behind the context."""
        parts = list(self.context)
        if question:
            parts.append({"type": "text", "text": self.separator + question})
        return [*self.history, {"role": "user", "content": parts}]


def pocket_cases(split: str, per_task: int, task_names: Sequence[str] = (), seed: int = 0) -> list[Case]:
    """Cases of the pocket suite (all tasks, or those named), taken in turn: any first part of the list is balanced.

    Raises:
        InputError: unknown split or task, or a negative seed.
    """
    return [_pocket_case(task, split, index, seed) for index in range(per_task) for task in task_names or TASKS]


def _pocket_case(task: str, split: str, index: int, seed: int) -> Case:
    scene, (question, answer) = asked_scene(task, split, index, seed)
    rng = stream(split, f"earlier {task}", index, seed)
    return Case(
        suite=POCKET,
        split=split,
        task=task,
        seed=seed,
        index=index,
        context=scene.content(),
        question=question,
        answer=answer,
        earlier=_other_question(scene, question, rng),
    )


def _other_question(scene: Scene, question: str, rng: np.random.Generator) -> Question:
    """A question of any task about the scene that is not `question`."""
    while True:
        asked = tasks.QUESTIONS[TASKS[int(rng.integers(len(TASKS)))]](scene, rng)
        if asked is not None and asked[0] != question:
            return asked


def unlabelled_cases(data: str, limit: int | None = None, seed: int = 0) -> list[Case]:
    """Prompts without answers, in any format that :func:`flowmm.profiler.load_calibration` reads.

    A recorded answer at the end of a conversation is left out: the full cache's own answer is the standard.

    Raises:
        InputError: no such data, nothing in it, a line that is not a prompt, or a conversation without a user's turn
            at its end.
    """
    from flowmm.profiler import load_calibration

    samples = load_calibration(data, limit=limit, seed=seed)
    return [_unlabelled_case(sample, Path(data).stem, seed, index) for index, sample in enumerate(samples)]


def _unlabelled_case(sample: CalibrationSample, suite: str, seed: int, index: int) -> Case:
    messages = list(sample.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise InputError(f"{sample.name}: expected a conversation with a user's turn at its end")
    *history, last = messages
    content = last["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    texts: list[str] = []
    while parts and parts[-1]["type"] == "text":
        texts.insert(0, parts.pop()["text"])
    return Case(
        suite,
        "all",
        UNLABELLED,
        seed,
        index,
        context=tuple(parts),
        question="".join(texts),
        history=tuple(history),
        separator="",
    )


SUITES: dict[str, Callable[[str, int, Sequence[str], int], list[Case]]] = {POCKET: pocket_cases}
"""Suites by name: (split, cases per task, tasks, seed) to cases."""
