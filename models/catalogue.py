"""The catalogue: names flowmm knows, and what a name given by the user stands for. No torch, no transformers."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from flowmm.errors import InputError, ModelLoadError
from flowmm.pocket import checkpoint_path

POCKET = "pocket"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelCard:
    """One known model. Shape fields are None only for an embedded model whose checkpoint is not installed."""

    aliases: tuple[str, ...]
    source: str
    family: str
    note: str
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_size: int | None = None
    embedded: bool = False

    @property
    def alias(self) -> str:
        """The first of the aliases."""
        return self.aliases[0]

    def kv_bytes(self, tokens: int, bytes_per_value: int = 2) -> int | None:
        """Bytes of keys and values that `tokens` tokens take over all layers (bf16 unless told otherwise)."""
        if self.num_layers is None or self.num_kv_heads is None or self.head_dim is None:
            return None
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * tokens * bytes_per_value


def _qwen25vl(size: str, layers: int, heads: int, kv_heads: int, hidden: int, *more_aliases: str) -> ModelCard:
    return ModelCard(
        aliases=(*more_aliases, f"qwen25vl-{size.lower()}"),
        source=f"Qwen/Qwen2.5-VL-{size}-Instruct",
        family="qwen25vl",
        note=f"Qwen2.5-VL {size} Instruct",
        num_layers=layers,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        hidden_size=hidden,
    )


_HUB_MODELS = (
    _qwen25vl("3B", 36, 16, 2, 2048),
    _qwen25vl("7B", 28, 28, 4, 3584, "qwen25vl"),
    _qwen25vl("32B", 64, 40, 8, 5120),
    _qwen25vl("72B", 80, 64, 8, 8192),
)


def known_models() -> tuple[ModelCard, ...]:
    """Every model with an alias; the embedded one last, its shape read from its ``config.json``."""
    return (*_HUB_MODELS, _pocket_card())


def _pocket_card() -> ModelCard:
    note = "embedded demo model"
    checkpoint = pocket_checkpoint()
    if checkpoint is None:
        return ModelCard((POCKET,), POCKET, "qwen25vl", f"{note}; not in this installation")
    text = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    text = text.get("text_config", text)
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    return ModelCard(
        aliases=(POCKET,),
        source=POCKET,
        family="qwen25vl",
        note=note,
        num_layers=text["num_hidden_layers"],
        num_attention_heads=heads,
        num_kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or hidden // heads,
        hidden_size=hidden,
        embedded=True,
    )


def pocket_checkpoint() -> Path | None:
    """Directory of the embedded checkpoint, or None when this installation has none."""
    try:
        return checkpoint_path()
    except ModelLoadError:
        return None


def resolve_source(name: str) -> str:
    """What `name` stands for: the path of a directory that exists, or a hub id (``organisation/name``).

    An alias wins over a directory of the same name; write ``./name`` for the directory.

    Raises:
        InputError: `name` is a bare word that is neither an alias nor a directory, or it is a file.
        ModelLoadError: `name` is a path without a directory, or the embedded model and this installation lacks it.
    """
    if name == POCKET:
        return str(checkpoint_path())
    for card in _HUB_MODELS:
        if name in card.aliases:
            return card.source
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        return str(directory)
    if directory.is_file():
        raise InputError(f"model {name!r} is a file; expected a directory with config.json and *.safetensors")
    if HUB_ID.fullmatch(name):
        return name
    if "/" in name or name.startswith((".", "~")):
        raise ModelLoadError(
            f"model {name!r}: no such directory; expected a directory with config.json and *.safetensors, "
            f"or a hub id such as {_example()!r}"
        )
    raise InputError(_unknown_name(name))


def _unknown_name(name: str) -> str:
    aliases = [alias for card in (*_HUB_MODELS, _pocket_card()) for alias in card.aliases]
    close = difflib.get_close_matches(name.lower(), aliases, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return (
        f"model {name!r} is unknown{hint} Expected one of {', '.join(aliases)}, a checkpoint directory, "
        f"or a hub id such as {_example()!r}"
    )


def _example() -> str:
    return _HUB_MODELS[1].source
