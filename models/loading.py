"""Load a model with its tokenizer and image processor; every way this can fail is a typed error."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file

from flowmm.errors import FlowmmError, InputError, ModelLoadError
from flowmm.models.catalogue import resolve_source
from flowmm.models.families import Family, family_of
from flowmm.models.fingerprint import fingerprint_model, public_source
from flowmm.models.messages import Conversation, split_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flowmm.models.families import GenerativeModel
    from flowmm.plans import ModelFingerprint

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


_NEEDED_FILES = (
    ("config.json",),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, with what turns messages into its inputs and ids into text.

    `source` is the hub id, ``pocket`` or the directory's name (never its path); `revision` the hub commit, or None.
    """

    model: GenerativeModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    family: Family
    source: str
    revision: str | None = None
    chat_template: str | None = None

    def build_inputs(
        self, messages: Conversation | Sequence[Conversation], *, add_generation_prompt: bool = True
    ) -> dict[str, torch.Tensor]:
        """Inputs for ``model(**inputs)`` and ``model.generate(**inputs)``.

        Args:
            messages: one conversation (a list of messages) or a list of conversations (a left-padded batch).
            add_generation_prompt: end with the opening of an assistant turn.

        Returns:
            ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (0 text and padding, 1 image): ``[B, L]`` int64;
            with images also ``pixel_values [patches, values]`` in the model's dtype and ``image_grid_thw [images, 3]``
            int64, images in row order. All on the model's device.

        Raises:
            InputError: malformed messages, unusable images, or a text that contains the model's image markers.
        """
        inputs = self.family.build_inputs(
            self.model.config,
            self.tokenizer,
            self.image_processor,
            split_conversations(messages),
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
        )
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str | list[str]:
        """Text of token ids without special tokens: a string for ``[L]``, a list of strings for ``[B, L]``."""
        ids = torch.as_tensor(ids)
        if ids.ndim == 2:
            return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def fingerprint(self) -> ModelFingerprint:
        """Fingerprint of the model as it is loaded."""
        return fingerprint_model(self.model, self.source, self.revision)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
    local_files_only: bool = False,
) -> LoadedModel:
    """Load a model by alias, directory or hub id (``flowmm models`` lists the aliases).

    Args:
        dtype: ``auto`` (as stored), ``bf16``, ``fp16`` or ``fp32``.
        device: ``auto`` takes cuda, else mps, else cpu; or any torch device. Not together with `device_map`.
        device_map: passed to transformers (needs accelerate), for models larger than one device.
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: allow code of the repository, which only an unusual tokenizer needs; models never run any.
        attn_implementation: transformers' name (``sdpa``, ``eager``, ``flash_attention_2``).
        local_files_only: use what is cached; the environment variable ``HF_HUB_OFFLINE=1`` does the same.

    Raises:
        InputError: unknown name, dtype, device or attention implementation, or options that exclude each other.
        UnsupportedModelError: the model's architecture is not supported.
        ModelLoadError: files are missing, damaged, unreachable, or do not belong together.
    """
    torch_dtype = choose_dtype(dtype)
    _check_attention(attn_implementation)
    target = choose_device(device) if device_map is None else _check_device_map(device)
    location = resolve_source(name)
    files: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    family = family_of(_read_config(location, files))
    # Small files first: what is wrong with them should not take a minute of reading weights to find out.
    code = {"trust_remote_code": trust_remote_code}
    tokenizer = _load_part("tokenizer", location, AutoTokenizer.from_pretrained, files | code)
    chat_template = _chat_template(location, tokenizer, files)
    image_processor = _load_part("image processor", location, family.load_image_processor, files)
    weights = {"dtype": torch_dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    model = _load_weights(family, location, files | weights)
    family.check_parts(model.config, tokenizer, image_processor)
    return LoadedModel(
        model=(model if target is None else _move(model, target)).eval(),
        tokenizer=tokenizer,
        image_processor=image_processor,
        family=family,
        source=public_source(location),
        revision=_cached_commit(location, files),
        chat_template=chat_template,
    )


def choose_dtype(dtype: str) -> torch.dtype | str:
    """The torch dtype behind ``bf16``, ``fp16`` or ``fp32``; ``auto`` stays.

    Raises:
        InputError: another name.
    """
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _check_attention(name: str) -> None:
    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS})
    if name not in known:
        raise InputError(f"attn_implementation {name!r}: this transformers knows {', '.join(known)}; try sdpa")


def choose_device(device: str) -> torch.device:
    """The device asked for; ``auto`` takes cuda, else mps, else cpu.

    Raises:
        InputError: a device that this machine or this torch does not have.
    """
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here ({reason}); try --device auto or cpu") from error
    return chosen


def _check_device_map(device: str) -> None:
    if device != "auto":
        raise InputError(f"device {device!r} and device_map exclude each other; give one of the two")
    if find_spec("accelerate") is None:
        raise ModelLoadError("device_map needs the accelerate package: pip install accelerate, or give a device")


def _move(model: GenerativeModel, device: torch.device) -> GenerativeModel:
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"the weights do not fit on {device}; use dtype bf16, a smaller model, or device_map='auto'"
        ) from error


def _read_config(location: str, files: dict[str, Any]) -> dict[str, Any]:
    directory = Path(location)
    if directory.is_dir():
        _check_directory(directory)
    config, _ = _load_part("config.json", location, PreTrainedConfig.get_config_dict, files)
    if not isinstance(config, dict):
        raise ModelLoadError(f"{location}: config.json holds a {type(config).__name__}; expected a JSON object")
    return config


def _cached_commit(location: str, files: dict[str, Any]) -> str | None:
    """The hub commit the files came from, read from where they lie in the cache; None for a directory."""
    path = _load_part("config.json", location, partial(cached_file, filename="config.json"), files)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/config\.json$", Path(path).as_posix())
    return commit.group(1) if commit else None


def _check_directory(directory: Path) -> None:
    present = {path.name for path in directory.iterdir()}
    absent = [" or ".join(names) for names in _NEEDED_FILES if present.isdisjoint(names)]
    if not any(name.endswith(".safetensors") for name in present):
        absent.append("*.safetensors")
    if absent:
        raise ModelLoadError(
            f"{directory}: no {', no '.join(absent)}; expected a complete checkpoint directory: download it again, or "
            f"copy the missing files from the original model"
        )


def _load_weights(family: Family, location: str, options: dict[str, Any]) -> GenerativeModel:
    model, report = _load_part("weights", location, family.load_weights, options)
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if absent:
        raise ModelLoadError(
            f"{location}: the weights lack or differ in shape in {len(absent)} tensors ({', '.join(absent[:3])}...); "
            f"expected all tensors of {family.architecture}: download or save the checkpoint again"
        )
    return model


def _load_part(part: str, location: str, load: Any, options: dict[str, Any]) -> Any:
    """``load(location, **options)`` with transformers' many exceptions turned into one that says what to do."""
    try:
        return load(location, **options)
    except FlowmmError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = reason.rstrip(".")
        raise ModelLoadError(f"{location}: cannot load the {part}: {reason}{_advice(location, error)}") from error


def _advice(location: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "; install that package or choose an option that does not need it"
    if Path(location).is_dir():
        return "; if the file is damaged, download or save the checkpoint again"
    return (
        "; if the model hub cannot be reached from here or HF_HUB_OFFLINE is set, download the repository where the "
        "network is available and pass its directory; a gated repository needs `hf auth login`"
    )


def _chat_template(location: str, tokenizer: Any, files: dict[str, Any]) -> str | None:
    """The processor's template if the checkpoint has one apart from the tokenizer's (``chat_template.json``)."""
    template = _load_part("chat template", location, _read_chat_template, files)
    if template is not None:
        return template
    if tokenizer.chat_template is None:
        raise ModelLoadError(
            f"{location}: no chat template; expected chat_template.jinja, chat_template.json, or chat_template in "
            f"tokenizer_config.json: use an instruct checkpoint"
        )
    return None


def _read_chat_template(location: str, **files: Any) -> str | None:
    path = cached_file(
        location,
        "chat_template.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **files,
    )
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"]
