"""load_model: the real loading code on a tiny checkpoint directory, and every way a checkpoint can be unusable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_checkpoint import CHAT_TEMPLATE, tiny_image, write_checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration

from flowmm.errors import InputError, ModelLoadError, UnsupportedModelError
from flowmm.models import build_messages, family_of, fingerprint_model, load_model, text_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-vl")


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_directory_loads_ready_to_generate(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), device="cpu")
    assert isinstance(loaded.model, Qwen2_5_VLForConditionalGeneration)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.bfloat16
    assert text_config(loaded.model.config)._attn_implementation == "sdpa"
    assert (loaded.source, loaded.revision, loaded.family.name) == ("tiny-vl", None, "qwen25vl")


def test_generation_from_messages_to_text(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), dtype="fp32", device="cpu")
    conversations = [build_messages("Which colour?", [tiny_image(), tiny_image(40, 40, "blue")]), build_messages("Hi")]
    inputs = loaded.build_inputs(conversations)
    generated = loaded.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    texts = loaded.decode(generated[:, inputs["input_ids"].shape[1] :])
    assert [type(text) for text in texts] == [str, str]
    for row, conversation in enumerate(conversations):
        single = loaded.build_inputs(conversation)
        alone = loaded.model.generate(**single, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert alone[0, -5:].tolist() == generated[row, -5:].tolist()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_is_that_of_weights_and_pixels(checkpoint: Path, name: str, dtype: torch.dtype) -> None:
    loaded = load_model(str(checkpoint), dtype=name, device="cpu")
    inputs = loaded.build_inputs(build_messages("?", [tiny_image()]))
    assert loaded.model.dtype == inputs["pixel_values"].dtype == dtype


def test_a_sharded_checkpoint_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    single, several = load_model(str(checkpoint)).model, load_model(str(sharded)).model
    for (name, left), right in zip(single.named_parameters(), several.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", max_shard_size="50KB")
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelLoadError, match="cannot load the weights"):
        load_model(str(sharded))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"no config\.json; expected"),
        ("model.safetensors", r"no \*\.safetensors"),
        ("tokenizer.json", r"no tokenizer\.json or vocab\.json"),
        ("preprocessor_config.json", r"no preprocessor_config\.json or"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_a_missing_file_is_named(damaged: Path, file: str, message: str) -> None:
    (damaged / file).unlink()
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(damaged))


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_a_truncated_file_is_a_load_error(damaged: Path, file: str) -> None:
    content = (damaged / file).read_bytes()
    (damaged / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match="cannot load"):
        load_model(str(damaged))


@pytest.mark.parametrize(("file", "content"), [("config.json", "[]"), ("chat_template.json", "{")])
def test_json_of_another_shape_is_a_load_error(damaged: Path, file: str, content: str) -> None:
    (damaged / file).write_text(content)
    with pytest.raises(ModelLoadError, match=r"config\.json|chat template"):
        load_model(str(damaged))


def test_missing_and_misshapen_tensors_are_not_made_up(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    edit_json(
        damaged / "config.json", text_config=config["text_config"] | {"num_hidden_layers": 5, "layer_types": None}
    )
    with pytest.raises(ModelLoadError, match="lack or differ"):
        load_model(str(damaged))
    edit_json(damaged / "config.json", text_config=config["text_config"] | {"intermediate_size": 80})
    with pytest.raises(ModelLoadError, match="weights"):
        load_model(str(damaged))


def test_pickled_weights_are_never_read(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    torch.save({}, damaged / "pytorch_model.bin")
    (damaged / "other.safetensors").touch()
    with pytest.raises(ModelLoadError, match="cannot load the weights"):
        load_model(str(damaged))


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl_text", "never_heard_of", None])
def test_another_architecture_is_named(damaged: Path, model_type: str | None) -> None:
    edit_json(damaged / "config.json", model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=rf"{model_type!r} is not supported; expected qwen2_5_vl"):
        load_model(str(damaged))


def test_parts_of_different_checkpoints_are_noticed(damaged: Path) -> None:
    edit_json(damaged / "preprocessor_config.json", merge_size=1)
    with pytest.raises(ModelLoadError, match="patch_size, merge_size"):
        load_model(str(damaged))
    edit_json(damaged / "preprocessor_config.json", merge_size=2)
    edit_json(damaged / "config.json", image_token_id=7)
    with pytest.raises(ModelLoadError, match="no special token with the id 7"):
        load_model(str(damaged))


def test_the_processors_chat_template_wins(damaged: Path) -> None:
    template = CHAT_TEMPLATE.replace("assistant", "helper")
    (damaged / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    inputs = load_model(str(damaged), device="cpu").build_inputs(build_messages("Hi"))
    assert load_model(str(damaged), device="cpu").decode(inputs["input_ids"])[0].endswith("helper\n")


def test_a_hub_model_that_is_not_cached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE is set, download the repository"):
        load_model("nobody/not-cached", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="nobody/not-cached: cannot load"):
        load_model("nobody/not-cached")


def test_a_cached_hub_model_loads_offline_with_its_commit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--nobody--tiny-vl"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_model("nobody/tiny-vl", local_files_only=True)
    assert (loaded.source, loaded.revision) == ("nobody/tiny-vl", commit)
    assert loaded.fingerprint() == fingerprint_model(loaded.model, revision=commit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype 'int3': expected one of auto, bf16"),
        ({"device": "warp"}, "device 'warp' cannot be used here"),
        ({"device": "cpu", "device_map": "auto"}, "exclude each other"),
    ],
)
def test_impossible_options_are_input_errors(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(str(checkpoint), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_a_missing_device_is_an_input_error(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="try --device auto"):
        load_model(str(checkpoint), device="cuda")


def test_an_attention_implementation_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="'no_such_attention': this transformers knows eager"):
        load_model(str(checkpoint), attn_implementation="no_such_attention")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_an_attention_package_that_is_not_installed(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot load the weights: .*; install that package"):
        load_model(str(checkpoint), attn_implementation="flash_attention_2")


@pytest.mark.skipif(find_spec("accelerate") is not None, reason="accelerate is installed")
def test_device_map_without_accelerate_says_so(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="pip install accelerate"):
        load_model(str(checkpoint), device_map="auto")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_device_map_places_the_model(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), device_map="auto")
    assert loaded.build_inputs(build_messages("Hi"))["input_ids"].device == loaded.model.device


@pytest.mark.parametrize("pick", [lambda model: model, lambda model: model.config])
def test_family_of_a_bare_model(pick: Callable[[Any], Any]) -> None:
    assert family_of(pick(tiny_model())).name == "qwen25vl"


def test_pocket_loads_like_any_directory() -> None:
    loaded = load_model("pocket", device="cpu")
    inputs = loaded.build_inputs(build_messages("What is in the image?", [tiny_image(24, 24)]))
    loaded.model.generate(**inputs, max_new_tokens=2)
    assert loaded.source == loaded.fingerprint().source == "pocket"
