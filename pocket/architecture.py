"""The pocket model: transformers' own Qwen2.5-VL at a tiny size, started with trainable retrieval circuits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from flowmm.pocket.tokenizer import words

PATCH_SIZE = 4
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2

# Distances from the last prompt token back to the words a question is about, through the chat template's fixed tail
# `?<|im_end|>\n<|im_start|>assistant\n`: the key, name or colour just before it, and the shape in
# `the SHAPE in image NAME?` and `the SHAPE which is COLOUR?`.
_NAME_OFFSET, _SHAPE_OFFSET = 6, 9
# `KEY is VALUE` and `NAME<|vision_start|>IMAGE` both put what is asked for two temporal positions after its name.
_LABEL_OFFSET = 2
MATCH_LAYERS = (1, 2, 3)


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Return the shipped size; special token ids come from the tokenizer."""
    names = ("im_end", "endoftext", "image_pad", "video_pad", "vision_start", "vision_end")
    ids = {name: tokenizer.encode(f"<|{name}|>")[0] for name in names}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [0, 1],
            "window_size": 112,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Return the processor that keeps generated images at their own size (sides in multiples of 8 px)."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=TEMPORAL_PATCH_SIZE,
        min_pixels=256,
        max_pixels=9216,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Return an untrained fp32 model; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _start_embeddings(model, tokenizer, generator)
        _start_retrieval(model, generator)
    return model


def _start_embeddings(model: Any, tokenizer: Qwen2Tokenizer, generator: torch.Generator) -> None:
    """Give rows unit norm, and the two tokens of a word (with and without a space) nearly the same row.

    Facts say `` kiwi`` where an answer says ``kiwi``: what is copied from one must be readable as the other.
    """
    table = model.get_input_embeddings().weight
    width = table.shape[1]
    table.normal_(0, width**-0.5, generator=generator)
    spaced = torch.randn(width, generator=generator) * 0.5 * width**-0.5
    for word in words():
        (bare,), (after_space,) = tokenizer.encode(word), tokenizer.encode(" " + word)
        table[after_space] = table[bare] + spaced
        table[bare] -= spaced


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random ``[rows, columns]`` matrix whose rows are orthonormal (``rows <= columns``)."""
    q, _ = torch.linalg.qr(torch.randn(columns, rows, generator=generator))
    return q.T.contiguous()


def _start_retrieval(model: Any, generator: torch.Generator) -> None:
    """Start layer 0 as offset heads and one head of each match layer as a lookup by what they wrote."""
    config = model.config.text_config
    head_dim, width = config.hidden_size // config.num_attention_heads, config.hidden_size
    layers = model.model.language_model.layers
    readers = [_orthonormal(head_dim, width, generator) for _ in range(config.num_key_value_heads)]
    writers = [_orthonormal(head_dim, width, generator) for _ in range(config.num_attention_heads)]
    offsets = (_LABEL_OFFSET, _NAME_OFFSET, _SHAPE_OFFSET, 1)
    inverse_frequencies = model.model.language_model.rotary_emb.inv_freq
    for head, offset in enumerate(offsets):
        _start_offset_head(layers[0].self_attn, head, offset, inverse_frequencies, writers[head])
    for kv_head, reader in enumerate(readers):
        layers[0].self_attn.v_proj.weight[kv_head * head_dim : (kv_head + 1) * head_dim] = reader
    for index in MATCH_LAYERS:
        attention = layers[index].self_attn
        _start_lookup_head(attention, readers[1], writers, _orthonormal(head_dim, width, generator))
        _start_find_head(attention, readers, writers)


def _start_offset_head(
    attention: Any, head: int, offset: int, inverse_frequencies: torch.Tensor, writer: torch.Tensor
) -> None:
    """Make a head look ``offset`` temporal positions back, whatever the tokens are, through its q and k biases."""
    head_dim = writer.shape[0]
    half, temporal = head_dim // 2, 8
    kv_head = head // (attention.num_heads // attention.num_key_value_heads)
    angle = inverse_frequencies[:temporal] * offset
    strength = 8.0
    query = torch.zeros(head_dim)
    query[:temporal], query[half : half + temporal] = strength * angle.cos(), -strength * angle.sin()
    key = torch.zeros(head_dim)
    key[:temporal] = strength
    rows = slice(head * head_dim, (head + 1) * head_dim)
    attention.q_proj.bias[rows] = query
    attention.q_proj.weight[rows] *= 0.1
    attention.k_proj.bias[kv_head * head_dim : (kv_head + 1) * head_dim] = key
    attention.k_proj.weight[kv_head * head_dim : (kv_head + 1) * head_dim] *= 0.1
    attention.o_proj.weight[:, rows] = 0.1 * writer.T


def _slow_dimensions(first_pair: int, end_pair: int, half: int) -> torch.Tensor:
    """Return head dimensions whose rotary angle hardly changes over a prompt, so that content can be compared there."""
    pairs = torch.arange(first_pair, end_pair)
    return torch.cat([pairs, pairs + half])


def _start_lookup_head(
    attention: Any, shape_reader: torch.Tensor, writers: list[torch.Tensor], values: torch.Tensor
) -> None:
    """Make head 0 read out the token whose label is the asked name and whose own content is the asked shape."""
    head_dim = values.shape[0]
    by_name, by_shape = _slow_dimensions(20, 32, head_dim // 2), _slow_dimensions(12, 20, head_dim // 2)
    label, name, shape = writers[0], writers[1], writers[2]
    attention.q_proj.weight[by_name] = 2.0 * name[by_name]
    attention.k_proj.weight[by_name] = 2.0 * label[by_name]
    attention.q_proj.weight[by_shape] = 3.0 * shape[by_shape]
    attention.k_proj.weight[by_shape] = 3.0 * shape_reader[by_shape]
    attention.v_proj.weight[:head_dim] = values
    attention.o_proj.weight[:, :head_dim] = 0.1 * values.T


def _start_find_head(attention: Any, readers: list[torch.Tensor], writers: list[torch.Tensor]) -> None:
    """Make head 2 read out the label of the token whose own content is the asked shape and colour."""
    head_dim = writers[0].shape[0]
    by_colour, by_shape = _slow_dimensions(20, 32, head_dim // 2), _slow_dimensions(12, 20, head_dim // 2)
    label, colour, shape = writers[0], writers[1], writers[2]
    query_rows, key_rows = 2 * head_dim, head_dim
    attention.q_proj.weight[query_rows + by_colour] = 2.5 * colour[by_colour]
    attention.k_proj.weight[key_rows + by_colour] = 2.5 * readers[0][by_colour]
    attention.q_proj.weight[query_rows + by_shape] = 3.0 * shape[by_shape]
    attention.k_proj.weight[key_rows + by_shape] = 3.0 * readers[1][by_shape]
    attention.v_proj.weight[key_rows : key_rows + head_dim] = label
    attention.o_proj.weight[:, query_rows : query_rows + head_dim] = 0.1 * readers[0].T
