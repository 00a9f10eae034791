"""What the runtime knows about a prompt before its first layer runs: modality, padding, proxies, lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowmm.plans.method import PROXY_RULES, parse_rule


@dataclass(frozen=True)
class PromptLayout:
    """One batch of prompts, seen from the cache.

    Attributes:
        visual: ``[B, L]`` bool, image and video placeholder tokens.
        valid: ``[B, L]`` bool, False on padding.
        lengths: true tokens of each row, on the host.
    """

    visual: Tensor
    valid: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_masks(cls, visual: Tensor, valid: Tensor) -> PromptLayout:
        """Build from ``[B, L]`` masks; reads the row lengths once (one device sync per prompt)."""
        return cls(visual & valid, valid, tuple(valid.sum(-1).tolist()))

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.valid.shape[-1]

    @property
    def text(self) -> Tensor:
        """``[B, L]`` bool: valid and not visual."""
        return self.valid & ~self.visual

    @property
    def mixed(self) -> Tensor:
        """``[B]`` bool: the prompt holds both text and images."""
        return self.visual.any(-1) & self.text.any(-1)

    @property
    def rank(self) -> Tensor:
        """``[B, L]`` long: 0, 1, ... over the valid tokens of each row (padding: undefined)."""
        return self.valid.long().cumsum(-1) - 1


@dataclass(frozen=True)
class Proxies:
    """Rows of the prompt's end whose attention ranks the entries (eq. 8).

    Attributes:
        index: ``[B, P]`` long, ascending columns; unused slots point at the row's last column.
        used: ``[B, P]`` bool.
    """

    index: Tensor
    used: Tensor

    def mask(self, length: int) -> Tensor:
        """``[B, L]`` bool, True on proxy positions."""
        mask = torch.zeros(self.index.shape[0], length, dtype=torch.bool, device=self.index.device)
        return mask.scatter_reduce(1, self.index, self.used, reduce="amax", include_self=True)


def find_proxies(layout: PromptLayout, rule: str) -> Proxies:
    """Last ``n`` tokens of each row (``last:n``), or its last ``n`` text tokens (``last_text:n``).

    A row with fewer candidates uses what it has; an image-only row under ``last_text`` falls back to its last tokens.
    """
    name, number = parse_rule(rule, PROXY_RULES)
    candidates = layout.valid
    if name == "last_text":
        text = layout.text
        candidates = torch.where(text.any(-1, keepdim=True), text, layout.valid)
    length = layout.valid.shape[-1]
    count = min(int(number or 1), length)
    columns = torch.arange(length, device=layout.valid.device)
    ranked = torch.where(candidates, columns, -1).sort(dim=-1).values[:, -count:]
    return Proxies(torch.where(ranked < 0, length - 1, ranked), ranked >= 0)
