"""What a plan was made for and made with: model, calibration prompts, environment. Data only; `models/` computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from flowmm.plans.fields import Count, Index, Name, NonNegative, Ratio, Record, Sha256, Share, Source

# Another value of these is another model: a plan's layers would not be its layers.
IDENTITY = (
    "model_type",
    "architecture",
    "num_layers",
    "num_attention_heads",
    "num_kv_heads",
    "head_dim",
    "hidden_size",
)
# Another value of these is a variant, such as a fine-tune: rho may differ, the plan still fits.
VARIANT = ("weights_sha256", "config_sha256", "revision", "source")


@dataclass(frozen=True)
class Mismatch:
    """One field in which a model differs from the one a plan was made for. Hard: refuse. Soft: warn."""

    field: str
    planned: Any
    found: Any
    severity: Literal["hard", "soft"]

    def __str__(self) -> str:
        return f"{self.field}: the plan says {self.planned}, the model has {self.found}"


class ModelFingerprint(Record):
    """Identity of a model. Counts and sizes are the text decoder's; `num_kv_heads` is per layer."""

    source: Source
    family: Name
    model_type: Name
    architecture: Name
    revision: Name | None
    num_layers: Count
    num_attention_heads: Count
    num_kv_heads: Count
    head_dim: Count
    hidden_size: Count
    dtype: Name
    attn_implementation: Name
    config_sha256: Sha256 | None
    weights_sha256: Sha256 | None

    def mismatches(self, other: ModelFingerprint) -> list[Mismatch]:
        """Fields in which the model `other` differs from this, the planned one; hard ones first.

        What either side does not know is not compared; equal weight hashes settle source and revision.
        """
        hard = [self._mismatch(other, field, "hard") for field in IDENTITY]
        same_weights = self.weights_sha256 is not None and self.weights_sha256 == other.weights_sha256
        variant = ("config_sha256",) if same_weights else VARIANT
        soft = [self._mismatch(other, field, "soft") for field in variant]
        return [mismatch for mismatch in hard + soft if mismatch is not None]

    def _mismatch(self, other: ModelFingerprint, field: str, severity: Literal["hard", "soft"]) -> Mismatch | None:
        planned, found = getattr(self, field), getattr(other, field)
        if planned is None or found is None or planned == found:
            return None
        # A hub id and a local copy of it share the last part.
        if field == "source" and planned.rpartition("/")[2] == found.rpartition("/")[2]:
            return None
        return Mismatch(field, planned, found, severity)


class TokenStatistics(Record):
    """Per calibration prompt: tokens (mean, min, max), share of visual tokens in [0, 1] (mean), images (mean)."""

    total_mean: NonNegative
    total_min: Index
    total_max: Index
    visual_share_mean: Share
    images_mean: NonNegative


class CalibrationFingerprint(Record):
    """Identity of the calibration prompts; `dataset_sha256` hashes the sample hashes in order.

    `n_samples` were measured; `n_skipped` more could not be read.
    """

    source: Source
    dataset_sha256: Sha256
    n_samples: Count
    seed: Index
    chat_template_sha256: Sha256 | None
    image_processor_sha256: Sha256 | None
    tokens: TokenStatistics
    n_skipped: Index = 0


class SensitivityFingerprint(Record):
    """How the layers' curves and choices were measured: under which protocols, on how many of the calibration prompts.

    `budgets` are the totals at which the choices were measured; absent: none were.
    """

    protocols: Annotated[tuple[Name, ...], Field(min_length=1, max_length=8)]
    n_samples: Count
    budgets: Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=64)] | None = None


class Environment(Record):
    """Versions and kind of device a plan was measured with. No host, user or path."""

    flowmm: Name
    python: Name
    torch: Name
    transformers: Name
    device: Name
    platform: Name
