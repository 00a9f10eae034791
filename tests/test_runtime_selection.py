"""Pivot selectors: exact counts, padding independence, and the rules they are named after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import oracle_generate
from tiny import tiny_inputs, tiny_model

import flowmm
from flowmm.models import fingerprint_model
from flowmm.plans import MethodParameters, unprofiled_plan
from flowmm.runtime import selection
from flowmm.runtime.compression import compress_layer
from flowmm.runtime.importance import column_mean
from flowmm.runtime.prompt import PromptLayout, find_proxies
from flowmm.runtime.rotary import Rotary
from flowmm.runtime.selection import image_ids

SELECTORS = [
    "proxy",
    "proxy_pool:5",
    "column_mean",
    "column_mean:8",
    "kcenter",
    "kcenter:1",
    "weighted_kcenter",
    "weighted_kcenter:1",
    "novelty:16",
    "random:3",
    "uniform",
    "proxy+kcenter",
    "proxy+weighted_kcenter",
    "uniform+random",
]
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "max_new_tokens": 4,
}


def rotary_of(length: int, dim: int = 8, start: int = 0) -> Rotary:
    frequencies = 100.0 ** (-torch.arange(dim // 2) / (dim // 2))
    angles = (torch.arange(length) - start)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)[None]
    return Rotary(angles.cos(), angles.sin())


def a_layer(seed: int, length: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, length, 8, generator=generator)
    key, value = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(2))
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, 6:16] = visual[:, 20:30] = True
    return query, key, value, PromptLayout.from_masks(visual, torch.ones_like(visual))


def positions(method: MethodParameters, count: int, layer: tuple[Any, ...], rotary: Rotary) -> torch.Tensor:
    query, key, value, layout = layer
    proxies = find_proxies(layout, method.proxies)
    cross = torch.tensor([True])
    return compress_layer(query, key, value, layout, proxies, (count,), cross, method, 8**-0.5, rotary).positions


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("count", [1, 2, 9, 37, 40])
def test_selectors_keep_exactly_the_budget(selector: str, count: int) -> None:
    method = MethodParameters(selector=selector, proxies="last_text:4", n_sink=2)
    kept = positions(method, count, a_layer(0, 40), rotary_of(40))
    assert kept.shape == (1, 2, count)
    assert (kept.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("options", [{}, {"image_quota": 0.0}, {"image_quota": 0.5}, {"modality_floor": 0.2}], ids=str)
def test_selectors_ignore_padding(selector: str, options: dict[str, float]) -> None:
    method = MethodParameters(selector=selector, proxies="last_text:4", n_sink=2, **options)  # ty: ignore[invalid-argument-type]
    query, key, value, layout = a_layer(1, 40)
    pad = 5

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(tensor[:, :, :pad], 7.0), tensor], dim=2)

    visual = torch.nn.functional.pad(layout.visual, (pad, 0))
    padded = PromptLayout.from_masks(visual, torch.arange(45)[None] >= pad)
    alone = positions(method, 13, (query, key, value, layout), rotary_of(40))
    moved = positions(method, 13, (*map(shifted, (query, key, value)), padded), rotary_of(45, start=pad))
    assert torch.equal(moved, alone + pad)


def test_column_mean_equals_the_dense_mean() -> None:
    query, key, _, layout = a_layer(2, 33)
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(
        torch.ones(33, 33, dtype=torch.bool).triu(1), float("-inf")
    )
    attention = scores.softmax(-1).view(1, 2, 2, 33, 33).mean(2)
    dense = attention.sum(2) / torch.arange(33, 0, -1)
    torch.testing.assert_close(column_mean(query, key, layout, 8**-0.5, block=7), dense)
    sampled = column_mean(query, key, layout, 8**-0.5, rows=3)
    rows = [10, 21, 32]
    seen = torch.tensor([sum(column <= row for row in rows) for column in range(33)])
    torch.testing.assert_close(sampled, attention[:, :, rows].sum(2) / seen)


@pytest.mark.parametrize("selector", ["kcenter:1", "weighted_kcenter:1"])
def test_kcenter_is_greedy_farthest_first(selector: str) -> None:
    query, key, value, layout = a_layer(3, 30)
    rotary = rotary_of(30)
    method = MethodParameters(selector=selector, keep_proxies=False, n_sink=1, image_quota=0.0, gate=False)
    kept = positions(method, 7, (query, key, value, layout), rotary)
    content = rotary.undo(key)[0]
    for head in range(2):
        centers = [0]
        weight = content[head].norm(dim=-1) if selector.startswith("weighted") else torch.ones(30)
        for _ in range(6):
            gap = torch.cdist(content[head], content[head][centers]).amin(-1) * weight
            centers.append(int(gap.argmax()))
        assert kept[0, head].tolist() == sorted(centers)


def test_a_long_prompt_offers_spaced_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    method = MethodParameters(selector="kcenter:1", keep_proxies=False, n_sink=1, image_quota=0.0)
    whole = positions(method, 5, a_layer(3, 40), rotary_of(40))
    assert bool((whole[..., 1:] % 2).any())
    monkeypatch.setattr(selection, "KCENTER_WHOLE", 40)
    spaced = positions(method, 5, a_layer(3, 40), rotary_of(40))
    assert not bool((spaced % 2).any())
    # Twenty candidates would not do for eight picks: all are looked at again.
    monkeypatch.setattr(selection, "CANDIDATES_PER_PICK", 8)
    assert positions(method, 5, a_layer(3, 40), rotary_of(40)).equal(whole)


@pytest.mark.parametrize("selector", ["kcenter", "proxy+kcenter", "weighted_kcenter"])
def test_candidates_ignore_padding(selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "KCENTER_WHOLE", 8)
    monkeypatch.setattr(selection, "CANDIDATES_PER_PICK", 1)
    test_selectors_ignore_padding(selector, {})


def test_rows_of_a_batch_have_their_own_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "KCENTER_WHOLE", 32)
    method = MethodParameters(selector="kcenter", proxies="last:4", n_sink=2)
    rows = [a_layer(seed, length) for seed, length in enumerate((64, 40, 24))]
    counts, padding = (9, 7, 5), (0, 24, 40)
    query, key, value = (
        torch.cat([torch.nn.functional.pad(row[part], (0, 0, gap, 0)) for row, gap in zip(rows, padding, strict=True)])
        for part in range(3)
    )
    visual = torch.cat(
        [torch.nn.functional.pad(row[3].visual, (gap, 0)) for row, gap in zip(rows, padding, strict=True)]
    )
    layout = PromptLayout.from_masks(visual, torch.arange(64) >= torch.tensor(padding)[:, None])
    angles = [rotary_of(64, start=gap) for gap in padding]
    rotary = Rotary(torch.cat([angle.cos for angle in angles]), torch.cat([angle.sin for angle in angles]))
    proxies = find_proxies(layout, method.proxies)
    cross = torch.ones(3, dtype=torch.bool)
    together = compress_layer(query, key, value, layout, proxies, counts, cross, method, 8**-0.5, rotary)
    for number, (row, count, gap) in enumerate(zip(rows, counts, padding, strict=True)):
        alone = positions(method, count, row, rotary_of(64 - gap))
        assert together.positions[number, :, :count].equal(alone[0] + gap)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_first_of_two_selectors_picks_its_share(share: float) -> None:
    layer = a_layer(5, 40)
    both = MethodParameters(selector="random+uniform", first_share=share, keep_proxies=False, n_sink=0, image_quota=0.0)
    alone = MethodParameters(selector="random", keep_proxies=False, n_sink=0, image_quota=0.0)
    kept, first = (
        positions(both, 12, layer, rotary_of(40)),
        positions(alone, int(12 * share) or 1, layer, rotary_of(40)),
    )
    for head in range(2):
        assert set(first[0, head].tolist()) <= set(kept[0, head].tolist()) or share == 0
    if share in (0.0, 1.0):
        name = "random" if share else "uniform"
        only = MethodParameters(selector=name, keep_proxies=False, n_sink=0, image_quota=0.0)
        assert kept.equal(positions(only, 12, layer, rotary_of(40)))


def test_uniform_is_evenly_spaced() -> None:
    method = MethodParameters(selector="uniform", keep_proxies=False, n_sink=0, image_quota=0.0)
    kept = positions(method, 10, a_layer(0, 40), rotary_of(40))
    assert kept[0, 0].tolist() == list(range(3, 40, 4))


def test_quotas_reach_every_image_and_modality() -> None:
    layer = a_layer(4, 40)
    layout = layer[3]
    ids = image_ids(layout)
    assert ids.max() == 2
    assert (ids > 0).equal(layout.visual)
    options = {"keep_proxies": False, "n_sink": 0, "selector": "random:1", "image_quota": 0.0}
    by_image = positions(MethodParameters.model_validate(options | {"image_quota": 1.0}), 12, layer, rotary_of(40))
    counts = torch.stack([(ids[0][by_image[0, 0]] == image).sum() for image in (1, 2)])
    assert (counts >= 3).all(), "each image holds a quarter of the prompt"
    floor = positions(MethodParameters.model_validate(options | {"modality_floor": 0.5}), 12, layer, rotary_of(40))
    assert layout.visual[0][floor[0]].sum(-1).tolist() == [6, 6]


def test_rotary_round_trip_and_both_host_layouts() -> None:
    key, rotary = torch.randn(1, 2, 12, 8), rotary_of(12)
    columns = torch.arange(12).expand(1, 2, 12)
    torch.testing.assert_close(rotary.redo(rotary.undo(key), columns), key, atol=1e-6, rtol=1e-5)
    axes = torch.randn(3, 1, 12, 8)
    put_together = Rotary.from_host(axes, axes, [1, 1, 2]).cos
    expected = torch.cat([axes[0, ..., 0:1], axes[1, ..., 1:2], axes[2, ..., 2:4]], -1)
    torch.testing.assert_close(put_together[..., :4], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "kcenter"},
        {"selector": "proxy+novelty"},
        {"key_space": "match_pre_rope"},
        {"key_space": "pre_rope", "merge": "tangent"},
        {"mass": "column_mean", "merge": "tangent"},
        {"mass": "column_mean:16", "merge": "mass", "image_quota": 0.5},
    ],
    ids=str,
)
def test_options_run_on_the_host_and_equal_the_oracle(options: dict[str, Any]) -> None:
    model: Any = tiny_model()
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__)
    inputs = tiny_inputs([[5, -16, 7, -25, 9, -9, 40], [4, -9, 16]])
    method = MethodParameters.model_validate({"proxies": "last_text:6", "n_sink": 1, **options})
    with flowmm.compress(model, plan, budget=0.3, method=method) as run:
        compressed = model.generate(**inputs, **GREEDY)
    reference = oracle_generate(model, run.cache, inputs, **GREEDY)
    torch.testing.assert_close(torch.stack(compressed.logits), torch.stack(reference.logits), atol=1e-5, rtol=1e-5)
    assert not [module for module in model.modules() if module._forward_hooks]


def test_unrotated_keys_of_equal_tokens_are_equal() -> None:
    """On the host, layer 0 keys depend on token and position only; undoing the rotation leaves the token."""
    model: Any = tiny_model(layers=1)
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__)
    ids = torch.full((1, 12), 7)
    seen: list[torch.Tensor] = []
    with flowmm.compress(model, plan, budget=0.5, method=MethodParameters(selector="kcenter")) as run:
        cache = run.new_cache()
        original = cache.see_rotary

        def watch(cos: torch.Tensor, sin: torch.Tensor, sections: list[int]) -> None:
            original(cos, sin, sections)
            seen.append(Rotary.from_host(cos, sin, sections).cos)

        cache.see_rotary = watch
        model(input_ids=ids, past_key_values=cache)
    assert seen[0].shape == (1, 12, 16)
    with torch.no_grad():
        layer = model.model.language_model.layers[0]
        hidden = layer.input_layernorm(model.get_input_embeddings()(ids))
        plain = layer.self_attn.k_proj(hidden).view(1, 12, 2, 16).transpose(1, 2)
        full = model(input_ids=ids).past_key_values.layers[0].keys
        cos, sin = model.model.language_model.rotary_emb(hidden, torch.arange(12).expand(3, 1, 12))
    sections = model.config.get_text_config().rope_parameters["mrope_section"]
    torch.testing.assert_close(Rotary.from_host(cos, sin, sections).undo(full), plain, atol=1e-5, rtol=1e-5)
