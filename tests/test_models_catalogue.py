"""Names: what is known, what a name stands for, and what a wrong name is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowmm.errors import InputError, ModelLoadError
from flowmm.models import catalogue
from flowmm.models.catalogue import ModelCard, known_models, resolve_source


def test_listing_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, flowmm.models as m; m.known_models(); print({'torch', 'transformers'} & set(sys.modules))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == "set()"


def test_known_models_agree_with_the_published_configurations() -> None:
    shapes = {
        card.source.removeprefix("Qwen/Qwen2.5-VL-"): (
            card.num_layers,
            card.num_attention_heads,
            card.num_kv_heads,
            card.head_dim,
            card.hidden_size,
        )
        for card in known_models()
        if card.source != "pocket"
    }
    assert shapes == {
        "3B-Instruct": (36, 16, 2, 128, 2048),
        "7B-Instruct": (28, 28, 4, 128, 3584),
        "32B-Instruct": (64, 40, 8, 128, 5120),
        "72B-Instruct": (80, 64, 8, 128, 8192),
    }


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    card = next(card for card in known_models() if card.alias == "qwen25vl")
    assert card.kv_bytes(1000) == 2 * 28 * 4 * 128 * 1000 * 2
    assert ModelCard(("x",), "x", "x", "no shape").kv_bytes(1000) is None


def test_pocket_is_listed_with_and_without_its_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    monkeypatch.setattr(catalogue, "checkpoint_path", lambda: tmp_path)
    pocket = known_models()[-1]
    assert (pocket.alias, pocket.embedded, pocket.head_dim, pocket.num_layers) == ("pocket", True, 32, 6)
    assert resolve_source("pocket") == str(tmp_path)

    def absent() -> Path:
        raise ModelLoadError("no pocket checkpoint")

    monkeypatch.setattr(catalogue, "checkpoint_path", absent)
    pocket = known_models()[-1]
    assert (pocket.alias, pocket.embedded, pocket.num_layers) == ("pocket", False, None)
    with pytest.raises(ModelLoadError):
        resolve_source("pocket")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qwen25vl", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen25vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen25vl-72b", "Qwen/Qwen2.5-VL-72B-Instruct"),
        ("somebody/fine-tune_1.0", "somebody/fine-tune_1.0"),
    ],
)
def test_names_resolve(name: str, source: str) -> None:
    assert resolve_source(name) == source


def test_an_existing_directory_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("qwen25v1", InputError, "did you mean .*qwen25vl"),
        ("zzz", InputError, r"unknown\. Expected one of .*qwen25vl-3b.*pocket"),
        ("", InputError, "Expected one of"),
        ("./nowhere", ModelLoadError, "no such directory"),
        ("/no/such/place", ModelLoadError, "no such directory"),
    ],
)
def test_wrong_names_are_explained(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_source(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(InputError, match="is a file"):
        resolve_source(str(weights))
