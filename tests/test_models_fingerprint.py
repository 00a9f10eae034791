"""Fingerprints: the same model gives the same one however it is stored or loaded, another model another one."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model
from tiny_checkpoint import write_checkpoint
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from flowmm.errors import UnsupportedModelError
from flowmm.models import fingerprint_model, load_model
from flowmm.models.fingerprint import config_sha256, public_source, weights_sha256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-vl")


def test_fields_of_a_loaded_model(checkpoint: Path) -> None:
    fingerprint = load_model(str(checkpoint), device="cpu").fingerprint()
    assert fingerprint.model_dump(exclude={"config_sha256", "weights_sha256"}) == {
        "source": "tiny-vl",
        "family": "qwen25vl",
        "model_type": "qwen2_5_vl",
        "architecture": "Qwen2_5_VLForConditionalGeneration",
        "revision": None,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "hidden_size": 64,
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
    }


def test_a_bare_model_has_the_same_fingerprint(checkpoint: Path) -> None:
    bare = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype="auto")
    assert fingerprint_model(bare) == load_model(str(checkpoint), device="cpu").fingerprint()


def test_a_model_made_in_memory_has_one() -> None:
    fingerprint = fingerprint_model(tiny_model())
    assert fingerprint.source == "Qwen2_5_VLForConditionalGeneration"
    assert fingerprint_model(tiny_model(), source="me/mine", revision="abc").source == "me/mine"


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        fingerprint_model(tiny_model().model.language_model)


def test_storage_and_dtype_do_not_change_the_hashes(checkpoint: Path, tmp_path: Path) -> None:
    expected = load_model(str(checkpoint)).fingerprint()
    sharded = write_checkpoint(tmp_path / "sharded", max_shard_size="50KB")
    load_model(str(checkpoint)).model.save_pretrained(checkpoint.parent / "again")
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint.parent / "again", dtype="auto")
    variants = [
        load_model(str(sharded)).fingerprint(),
        fingerprint_model(again),
        load_model(str(checkpoint), dtype="fp32").fingerprint(),
        load_model(str(checkpoint), dtype="bf16", attn_implementation="eager").fingerprint(),
    ]
    for variant in variants:
        assert variant.weights_sha256 == expected.weights_sha256
        assert variant.config_sha256 == expected.config_sha256


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.2.self_attn.q_proj.weight", "model.visual.merger.ln_q.weight"]
)
def test_one_changed_parameter_changes_the_weights_hash(name: str) -> None:
    model = tiny_model()
    before = weights_sha256(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)
    assert weights_sha256(model) != before


def test_weights_hash_ignores_memory_layout() -> None:
    model = tiny_model()
    before = weights_sha256(model)
    weight = model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight")
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert weights_sha256(model) == before


def test_weights_out_of_reach_have_no_hash() -> None:
    model = tiny_model()
    weight = model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight")
    model.model.language_model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to("meta"))
    assert weights_sha256(model) is None
    assert fingerprint_model(model).weights_sha256 is None


def test_weights_hash_is_as_documented() -> None:
    """The hash of one small layer, written out: plans hold these values, so they must never change."""
    layer = torch.nn.Linear(3, 17, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(51.0).reshape(17, 3))
    values = torch.arange(0, 48, 3).to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()
    assert weights_sha256(layer) == hashlib.sha256(b'["weight",[17,3]]\n' + values).hexdigest()


@pytest.mark.parametrize(
    "path",
    ["text_config.num_hidden_layers", "text_config.rms_norm_eps", "vision_config.depth", "image_token_id"],
)
def test_config_hash_sees_the_architecture(path: str) -> None:
    config = tiny_config()
    before = config_sha256(config)
    owner, field = config, path
    if "." in path:
        section, field = path.split(".")
        owner = getattr(config, section)
    setattr(owner, field, getattr(owner, field) * 2)
    assert config_sha256(config) != before


def test_config_hash_sees_rope_and_ignores_the_rest() -> None:
    config = tiny_config()
    before = config_sha256(config)
    other: Any = copy.deepcopy(config)
    other._name_or_path, other.dtype, other.transformers_version = "/some/where", torch.float16, "5.16.0"
    other.text_config._attn_implementation = "eager"
    other.text_config.attention_dropout = 0.5
    assert config_sha256(other) == before
    other.text_config.rope_parameters["rope_theta"] = 5e5
    assert config_sha256(other) != before


def test_config_hash_of_the_tiny_model_is_pinned() -> None:
    """Guards against a field that another transformers version spells differently, and against accidental changes."""
    assert config_sha256(tiny_config()) == "e4a99210f03d86cd40a772cdd8100e97e647b227b8d0f2ada5c3a38905710255"


def test_sources_never_show_a_path(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert public_source(str(checkpoint)) == "tiny-vl"
    assert public_source(str(checkpoint) + os.sep) == "tiny-vl"
    assert public_source("/gone/since/tiny-vl") == "tiny-vl"
    assert public_source("./tiny-vl") == "tiny-vl"
    assert public_source("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    monkeypatch.chdir(checkpoint.parent.parent)
    assert public_source(f"{checkpoint.parent.name}/tiny-vl") == "tiny-vl"


def test_config_hash_of_the_flat_format_of_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    """Published checkpoints keep the text fields at the top level and name rope by its old keys."""
    nested = json.loads((checkpoint / "config.json").read_text())
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("model_type", "layer_types"):
        text.pop(key)
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = text | nested | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    published = Qwen2_5_VLConfig.from_pretrained(tmp_path)
    assert config_sha256(published) == config_sha256(Qwen2_5_VLConfig.from_pretrained(checkpoint))
