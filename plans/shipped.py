"""Plans that come with flowmm, and how a name on the command line becomes a plan file."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from flowmm.errors import InputError
from flowmm.plans.fingerprint import ModelFingerprint
from flowmm.plans.schema import Plan
from flowmm.plans.unprofiled import unprofiled_plan

SHIPPED_DIRECTORY = Path(__file__).parent

QWEN25VL_7B = ModelFingerprint(
    source="Qwen/Qwen2.5-VL-7B-Instruct",
    family="qwen25vl",
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    revision=None,
    num_layers=28,
    num_attention_heads=28,
    num_kv_heads=4,
    head_dim=128,
    hidden_size=3584,
    dtype="bfloat16",
    attn_implementation="sdpa",
    config_sha256=None,
    weights_sha256=None,
)


def shipped_names() -> list[str]:
    """Stems of the plan files that come with flowmm, such as ``qwen25vl``."""
    return sorted(path.stem for path in SHIPPED_DIRECTORY.glob("*.json") if not path.name.endswith(".schema.json"))


def resolve_plan(name: str | os.PathLike[str]) -> Path:
    """The file a plan's name means: an existing file, else a shipped ``STEM``, ``STEM.json`` or ``plans/STEM.json``.

    Raises:
        InputError: neither; the message lists the shipped names.
    """
    path, shipped = PurePath(name), shipped_names()
    if Path(name).is_file():
        return Path(name)
    if str(path.parent) in (".", "plans") and path.suffix in ("", ".json") and path.stem in shipped:
        return SHIPPED_DIRECTORY / f"{path.stem}.json"
    if Path(name).is_dir():
        raise InputError(f"{name}: is a directory, expected a plan file (*.json)")
    if Path(name).exists():
        return Path(name)
    raise InputError(f"{name}: no such plan file, and no shipped plan of that name ({', '.join(shipped)})")


def write_shipped() -> None:
    """Write the shipped plans that are made from facts instead of measurements."""
    qwen25vl_plan().save(SHIPPED_DIRECTORY / "qwen25vl.json")


def qwen25vl_plan() -> Plan:
    """``plans/qwen25vl.json``: its version and time are fixed, so that the file changes only with the format."""
    return unprofiled_plan(QWEN25VL_7B, flowmm_version="0.1.0", created_at="2026-11-21T00:00:00Z")
