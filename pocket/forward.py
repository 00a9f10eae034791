"""The training forward pass: the model's own modules and numbers, batched for equal images and packed rows."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from flowmm.pocket.batches import GRID, MERGE_SIZE, Batch, patches
from flowmm.pocket.precision import fast_dtype


def visual_embeddings(model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Return ``[N, tokens, hidden]`` for ``pixels [N, GRID * GRID, channels]``.

    The model's own vision forward attends image by image in a Python loop; equal sizes allow one batched call.
    """
    tower = model.model.visual
    n, length, _ = pixels.shape
    rows = torch.arange(GRID).view(GRID // MERGE_SIZE, 1, MERGE_SIZE, 1)
    columns = torch.arange(GRID).view(1, GRID // MERGE_SIZE, 1, MERGE_SIZE)
    shape = (GRID // MERGE_SIZE, GRID // MERGE_SIZE, MERGE_SIZE, MERGE_SIZE)
    places = torch.stack([rows.expand(shape).flatten(), columns.expand(shape).flatten()])
    hidden = tower.patch_embed(pixels.reshape(n * length, -1)).view(n, length, -1)
    cos, sin = tower.rotary_pos_emb(hidden, places.T)
    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(n, length, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        seen = scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        hidden = hidden + attention.proj(seen.transpose(1, 2).reshape(n, length, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden.reshape(n * length, -1)).view(n, length // MERGE_SIZE**2, -1)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    *,
    shared: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as ``attention_mask`` says; the first ``shared`` rows are plainly causal, which halves their work."""
    early_query, early_key, early_value = (state[:, :, :shared] for state in (query, key, value))
    context = scaled_dot_product_attention(
        early_query, early_key, early_value, is_causal=True, scale=scaling, enable_gqa=True
    )
    mask = attention_mask[:, :, shared:]
    rest = scaled_dot_product_attention(
        query[:, :, shared:], key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return torch.cat([context, rest], dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("pocket_packed", packed_attention)


@contextmanager
def _attending_packed(config: Any) -> Generator[None]:
    usual, config._attn_implementation = config._attn_implementation, "pocket_packed"
    try:
        yield
    finally:
        config._attn_implementation = usual


# Visual tokens have seen the pictures in front of them before this layer, and two match layers lie behind it.
NOTICING_LAYER = 2


class Answers(NamedTuple):
    """Logits ``[answers, vocabulary]`` at every scored position; visual tokens ``[images, tokens, hidden]``.

    ``visual`` are the embeddings that entered the text model, ``noticed`` the same tokens in front of
    ``NOTICING_LAYER``.
    """

    logits: torch.Tensor
    visual: torch.Tensor
    noticed: torch.Tensor


class Packed(torch.nn.Module):
    """Answers packed batches with a model's own modules."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, image_token: int, blind_layer: int | None = None) -> Answers:
        """Answer a batch; in ``blind_layer`` questions cannot see the context."""
        model = self.model
        visual = visual_embeddings(model, patches(batch.images).to(model.lm_head.weight.dtype))
        words = model.get_input_embeddings()(batch.ids)
        is_image = (batch.ids == image_token)[..., None]
        with _attending_packed(model.config.text_config), self._blinded(blind_layer, batch.blind):
            states = model.model.language_model(
                inputs_embeds=words.masked_scatter(is_image, visual),
                position_ids=batch.positions,
                attention_mask={"full_attention": batch.mask},
                use_cache=False,
                shared=batch.shared,
                output_hidden_states=True,
            )
        return Answers(
            logits=model.lm_head(states.last_hidden_state[batch.targets >= 0]),
            visual=visual,
            noticed=states.hidden_states[NOTICING_LAYER][is_image[..., 0]].view_as(visual),
        )

    @contextmanager
    def _blinded(self, layer: int | None, mask: torch.Tensor) -> Generator[None]:
        """Give one layer another mask, which the model's own forward pass has no argument for."""
        if layer is None:
            yield
            return

        def swap(_: torch.nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
            return args, options | {"attention_mask": mask}

        attention = self.model.model.language_model.layers[layer].self_attn
        handle = attention.register_forward_pre_hook(swap, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def fast(self, batch: Batch, image_token: int, blind_layer: int | None = None) -> Answers:
        """Run ``forward`` on copies of the weights in the faster number format; gradients reach the originals."""
        copies = {name: parameter.to(fast_dtype()) for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self, copies, (batch, image_token, blind_layer), tie_weights=True)
