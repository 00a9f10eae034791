"""What the vision tower is taught: labels follow the objects' cells, and the loss is lowest for the right words."""

import torch

from flowmm.pocket import tasks
from flowmm.pocket.sight import arrival_labels, naming_loss, noticing_loss, object_labels
from flowmm.pocket.tokenizer import build_tokenizer


def _pictures(count: int) -> list[tasks.Picture]:
    return tasks.draw_scene(tasks.stream("train", "any", 0), "train", images=count, pairs=0).pictures


def test_each_visual_token_is_labelled_with_the_object_of_its_cell() -> None:
    (picture,) = _pictures(1)
    (labels,) = object_labels([picture])
    for item in picture.objects:
        row, column = item.cell
        digit = -100 if item.digit is None else item.digit
        expected = torch.tensor([tasks.SHAPES.index(item.shape), list(tasks.COLOURS).index(item.colour), digit])
        assert (labels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] == expected).all()
    assert (labels[..., 0] >= 0).sum() == 4 * len(picture.objects)


def test_embeddings_that_say_the_right_words_are_named_right() -> None:
    tokenizer = build_tokenizer()
    table = torch.randn(len(tokenizer), 256, generator=torch.Generator().manual_seed(0)) / 16
    labels = object_labels(_pictures(12))
    said = (tasks.SHAPES, tuple(tasks.COLOURS), tuple("0123456789"))
    embedded = torch.zeros(*labels.shape[:3], 256)
    for kind, words in enumerate(said):
        for number, word in enumerate(words):
            token = table[tokenizer.encode(word)[-1]] + table[tokenizer.encode(" " + word)[-1]]
            embedded[labels[..., kind] == number] += token
    right, shares = naming_loss(embedded.flatten(1, 2), labels, table, tokenizer)
    wrong, _ = naming_loss(-embedded.flatten(1, 2), labels, table, tokenizer)
    assert right < wrong
    assert shares == {"shape": 1.0, "colour": 1.0, "digit": 1.0}


def test_a_batch_without_digits_has_a_finite_loss() -> None:
    tokenizer = build_tokenizer()
    labels = torch.full((1, 4, 4, 3), -100)
    loss, _ = naming_loss(torch.ones(1, 16, 8), labels, torch.ones(len(tokenizer), 8), tokenizer)
    assert loss == 0


def test_only_tokens_of_the_object_that_arrived_are_to_be_noticed() -> None:
    scene = tasks.draw_scene(tasks.stream("train", "any", 1), "train", images=3, pairs=2, facts=0, fillers=0)
    labels = arrival_labels([scene])
    names = object_labels(scene.pictures)[..., 0]
    for pair in scene.pairs:
        (place,) = (i for i, picture in enumerate(scene.pictures) if picture is pair.after)
        assert (names[place][labels[place]] == tasks.SHAPES.index(pair.arrived.shape)).all()
    assert labels.sum() == 4 * 2


def test_tokens_that_say_change_where_something_arrived_are_told_right() -> None:
    tokenizer = build_tokenizer()
    table = torch.randn(len(tokenizer), 256, generator=torch.Generator().manual_seed(0)) / 16
    scene = tasks.draw_scene(tasks.stream("train", "any", 1), "train", images=3, pairs=2, facts=0, fillers=0)
    labels = arrival_labels([scene])
    word = table[tokenizer.encode("change")[-1]] + table[tokenizer.encode(" change")[-1]]
    right, told = noticing_loss(labels.flatten(1).float()[..., None] * word, labels, table, tokenizer)
    wrong, _ = noticing_loss(-labels.flatten(1).float()[..., None] * word, labels, table, tokenizer)
    assert right < wrong
    assert told == 1.0
