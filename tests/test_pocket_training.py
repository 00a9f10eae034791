"""Training: packed rows equal the model's own forward pass, a stopped run resumes exactly, losses go down."""

import dataclasses
from pathlib import Path

import pytest
import torch

from flowmm.pocket import tasks
from flowmm.pocket.architecture import MERGE_SIZE, build_image_processor
from flowmm.pocket.batches import draw_branch, pack
from flowmm.pocket.muon import orthogonalise
from flowmm.pocket.tokenizer import build_tokenizer
from flowmm.pocket.train import Level, Recipe, Trainer, save_checkpoint

SMALL = Recipe(
    vision_steps=2,
    vision_images=8,
    steps=4,
    questions=3,
    second_turns=0.5,
    levels=(Level(1_000_000, 2, (1, 2), (0, 1), (1, 2), (0, 1)),),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    whole, first, second = (Trainer(SMALL, tokenizer) for _ in range(3))
    losses = [whole.advance()["loss"] for _ in range(6)]
    resumed = [first.advance()["loss"] for _ in range(3)]
    first.save_state(tmp_path / "state.safetensors")
    second.load_state(tmp_path / "state.safetensors")
    assert second.step == 3
    resumed += [second.advance()["loss"] for _ in range(3)]
    assert resumed == losses
    assert second.tokens == whole.tokens
    torch.testing.assert_close(_weights(second), _weights(whole), rtol=0, atol=0)


def test_a_run_can_begin_with_an_earlier_checkpoint(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    first, second = Trainer(SMALL, tokenizer), Trainer(dataclasses.replace(SMALL, seed=1), tokenizer)
    save_checkpoint(first, tmp_path)
    second.load_weights(tmp_path, step=4)
    assert second.step == 4
    rounded = {name: value.bfloat16().float() for name, value in _weights(first).items()}
    torch.testing.assert_close(_weights(second), rounded, rtol=0, atol=0)


def test_a_few_steps_lower_the_loss() -> None:
    recipe = dataclasses.replace(SMALL, vision_steps=0, schedule=((0, 1.0),))
    trainer = Trainer(recipe, build_tokenizer())
    losses = [trainer.advance()["loss"] for _ in range(8)]
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]


def test_packed_answers_equal_single_prompts_through_the_model_itself() -> None:
    trainer = Trainer(SMALL, build_tokenizer())
    packer, model = trainer.packer, trainer.model
    rng = tasks.stream("train", "any", 0)
    scenes = [tasks.draw_scene(rng, "train", 2, 1, 3, 1) for _ in range(2)]
    shares = (1 / len(tasks.TASKS),) * len(tasks.TASKS)
    rows = [packer.row(scene, [draw_branch(scene, rng, shares, turns) for turns in (1, 2, 1)]) for scene in scenes]
    batch = pack(rows, scenes, packer.pad_token)
    with torch.no_grad():
        packed = trainer.packed(batch, packer.image_token).logits
    found = []
    for row, scene in zip(rows, scenes, strict=True):
        images = [part["image"] for part in scene.content() if part["type"] == "image"]
        pixels = build_image_processor()(images=images, return_tensors="pt")
        for branch in range(1, max(row.branches) + 1):
            chosen = [i for i, owner in enumerate(row.branches) if owner in (0, branch)]
            ids = torch.tensor([[row.ids[i] for i in chosen]])
            with torch.no_grad():
                logits = model(input_ids=ids, mm_token_type_ids=(ids == packer.image_token).int(), **pixels).logits
            found += [logits[0, place] for place, i in enumerate(chosen) if row.targets[i] >= 0]
    assert pixels["image_grid_thw"].prod(-1).sum() == 3 * 16 * MERGE_SIZE**2
    torch.testing.assert_close(packed, torch.stack(found), rtol=1e-4, atol=1e-4)


def test_a_blind_layer_hides_the_context_from_questions_only() -> None:
    trainer = Trainer(SMALL, build_tokenizer())
    _, batch = trainer.batch(0)
    lost = (batch.mask & ~batch.blind)[:, 0]
    assert lost[batch.targets >= 0].any(dim=-1).all()
    assert not lost[:, :4].any()
    assert not lost[:, :, 0].any()
    with torch.no_grad():
        seeing = trainer.packed(batch, trainer.packer.image_token).logits
        blind = trainer.packed(batch, trainer.packer.image_token, blind_layer=1).logits
        again = trainer.packed(batch, trainer.packer.image_token).logits
    assert not torch.equal(seeing, blind)
    torch.testing.assert_close(seeing, again, rtol=0, atol=0)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5
