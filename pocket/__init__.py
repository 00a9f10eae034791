"""The embedded pocket model: a tiny Qwen2.5-VL with its own tasks, trained by ``python -m flowmm.pocket.train``."""

from __future__ import annotations

from pathlib import Path

from flowmm.errors import ModelLoadError

__all__ = ["checkpoint_path"]


def checkpoint_path() -> Path:
    """Return the directory of the shipped weights, tokenizer and image processor.

    Raises:
        ModelLoadError: the directory is missing or holds no ``config.json``.
    """
    directory = Path(__file__).parent / "checkpoint"
    if not (directory / "config.json").is_file():
        raise ModelLoadError(
            f"no pocket checkpoint at {directory}; expected config.json and model.safetensors there: "
            "reinstall flowmm, or train the weights with `python -m flowmm.pocket.train`"
        )
    return directory
