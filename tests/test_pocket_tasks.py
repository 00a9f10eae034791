"""The generator: deterministic, disjoint between splits, several objects per image, prompts of the promised size."""

import numpy as np
import pytest

from flowmm.errors import InputError
from flowmm.pocket import tasks


def _fingerprint(sample: tasks.Sample) -> tuple:
    pixels = tuple(np.asarray(image).tobytes() for image in sample.images)
    return sample.question, sample.answer, pixels, tuple(p["text"] for p in sample.context if p["type"] == "text")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_same_arguments_give_the_same_sample(task: str) -> None:
    first, again = (tasks.sample(task, "test", 3, seed=5) for _ in range(2))
    assert _fingerprint(first) == _fingerprint(again)
    assert _fingerprint(first) != _fingerprint(tasks.sample(task, "test", 3, seed=6))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_content_is_shared_between_splits(task: str) -> None:
    seen = {
        split: {
            pixels for i in range(200) for pixels in _fingerprint(tasks.sample(task, split, i, images=4, pairs=1))[2]
        }
        for split in tasks.SPLITS
    }
    assert all(len(pixels) == 1000 for pixels in seen.values())
    assert len(set().union(*seen.values())) == 1000 * len(tasks.SPLITS)


def test_samples_take_the_tasks_in_turn() -> None:
    drawn = list(tasks.samples("calibration", 5, seed=1))
    assert [sample.task for sample in drawn] == [tasks.TASKS[i % len(tasks.TASKS)] for i in range(5)]
    assert [sample.index for sample in drawn] == [i // len(tasks.TASKS) for i in range(5)]
    assert _fingerprint(drawn[2]) == _fingerprint(tasks.sample(drawn[2].task, "calibration", drawn[2].index, seed=1))


def test_an_image_cannot_be_answered_from_one_of_its_tokens() -> None:
    for i in range(100):
        for picture in tasks.draw_scene(tasks.stream("test", "any", i), "test").pictures:
            shapes = [item.shape for item in picture.objects]
            assert len(shapes) >= 2
            assert len(set(shapes)) == len(shapes)
            assert len({item.cell for item in picture.objects}) == len(shapes)


def test_answers_follow_from_the_scene_and_are_the_only_ones() -> None:
    for index in range(20):
        for task in tasks.TASKS:
            scene, (question, answer) = tasks.asked_scene(task, "test", index)
            shown = [(p.name, item) for p in scene.pictures for item in p.objects]
            possible = {
                "text_needle": [f.value for f in scene.facts if question == f"what is {f.key}?"],
                "colour_needle": [
                    item.colour for name, item in shown if question.endswith(f" {item.shape} in image {name}?")
                ],
                "digit_needle": [
                    str(item.digit) for name, item in shown if item.digit is not None and question.endswith(f" {name}?")
                ],
                "find": [name for name, item in shown if question.endswith(f"{item.shape} which is {item.colour}?")],
                "visual_change": [
                    item.shape
                    for pair in scene.pairs
                    for item in pair.after.objects
                    if question.endswith(f"change in image {pair.before.name}?")
                    and item.shape not in {other.shape for other in pair.before.objects}
                ],
            }
            assert set(possible[task]) == {answer}


def test_no_split_sees_the_handwriting_of_another() -> None:
    seen = {split: {ink.tobytes() for ink in tasks._handwriting(split)[0]} for split in tasks.SPLITS}
    assert sum(len(inks) for inks in seen.values()) == len(set().union(*seen.values())) == 1797


def test_messages_are_one_user_turn_that_ends_with_the_question() -> None:
    sample = tasks.sample("text_needle", "test", 0)
    (turn,) = sample.messages()
    assert turn["role"] == "user"
    assert turn["content"][-1] == {"type": "text", "text": "\n" + sample.question}
    assert turn["content"][:-1] == list(sample.context)
    assert {image.size for image in sample.images} == {(tasks.IMAGE_SIZE, tasks.IMAGE_SIZE)}


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        (("no_such_task", "test", 0), {}),
        (("text_needle", "no_such_split", 0), {}),
        (("text_needle", "test", -1), {}),
        (("text_needle", "test", 0), {"images": 21}),
        (("text_needle", "test", 0), {"facts": 0}),
        (("colour_needle", "test", 0), {"images": 0}),
        (("visual_change", "test", 0), {"pairs": 0}),
        (("visual_change", "test", 0), {"images": 2, "pairs": 3}),
    ],
)
def test_what_cannot_be_drawn_is_an_input_error(arguments: tuple, sizes: dict) -> None:
    with pytest.raises(InputError):
        tasks.sample(*arguments, **sizes)
