"""Rotary position embedding undone and redone, so that keys can be compared by content instead of by place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosine and sine of every prompt token, ``[B, L, D]`` (M-RoPE sections already put together)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def from_host(cls, cos: Tensor, sin: Tensor, sections: list[int]) -> Rotary:
        """Accept ``[B, L, D]``, or the ``[3, B, L, D]`` that some transformers versions keep per position axis."""
        if cos.ndim == 4:
            widths = [*sections, *sections]
            cos, sin = (
                torch.cat([part[axis % 3] for axis, part in enumerate(angle.split(widths, dim=-1))], dim=-1)
                for angle in (cos, sin)
            )
        return cls(cos, sin)

    def followed_by(self, later: Rotary) -> Rotary:
        """Of these tokens and of those of `later` after them."""
        return Rotary(torch.cat([self.cos, later.cos], dim=1), torch.cat([self.sin, later.sin], dim=1))

    def first(self, count: int) -> Rotary:
        """Of the first `count` tokens."""
        return Rotary(self.cos[:, :count], self.sin[:, :count])

    def at(self, positions: Tensor) -> Rotary:
        """Of the tokens at `positions` ``[B * H, n]``, one row of this batch giving `H` rows."""
        index = positions[..., None].expand(*positions.shape, self.cos.shape[-1])
        repeats = len(positions) // len(self.cos)
        cos, sin = (angle.repeat_interleave(repeats, 0).gather(1, index) for angle in (self.cos, self.sin))
        return Rotary(cos, sin)

    def undo(self, keys: Tensor) -> Tensor:
        """``[B, H, L, D]`` rotated keys to fp32 keys without position."""
        return _turn(keys.float(), self.cos[:, None].float(), self.sin[:, None].float().neg())

    def redo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[B, H, N, D]`` to the columns `positions` ``[B, H, N]``; fp32."""
        index = positions[..., None].expand(*positions.shape, self.cos.shape[-1])
        cos, sin = (
            angle[:, None].expand(-1, positions.shape[1], -1, -1).gather(2, index).float()
            for angle in (self.cos, self.sin)
        )
        return _turn(keys.float(), cos, sin)


def _turn(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = keys * cos
    half = keys.shape[-1] // 2
    turned[..., :half].addcmul_(keys[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(keys[..., :half], sin[..., half:])
    return turned
