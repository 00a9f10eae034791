"""Build the pocket tokenizer: byte-level BPE over the generator's words, with Qwen2.5-VL's chat template."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from flowmm.pocket import tasks

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_QUESTION_WORDS = "what which is the in image colour change shows user assistant system"


def words() -> list[str]:
    """Return every word the generator can write, sorted."""
    text = " ".join((*tasks.FILLERS, _QUESTION_WORDS)).replace(".", "")
    return sorted({*text.split(), *tasks.NAMES, *tasks.KEYS, *tasks.VALUES, *tasks.COLOURS, *tasks.SHAPES})


def build_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer in which each generator word is one token, with or without a space before it.

    All 256 bytes are in the vocabulary, so any text can be encoded; text comes back NFC-normalised.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text for word in words() for text in (word, " " + word)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    # transformers types merges as text; its BPE takes pairs, which a token with a space in it cannot break.
    merges: Any = [tuple(pair) for pair in model["merges"]]
    built = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
    )
    built.chat_template = CHAT_TEMPLATE
    return built
