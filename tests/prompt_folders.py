"""Folders of tiny pipelines with random text encoders, as diffusers writes them."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch

from harness.networks.prompt_encoders import quiet

WIDTH, CLIP_WIDTH, CLIP_TOKENS = 16, 8, 7


def t5_tokenizer() -> Any:
    """A tokenizer of letters and of two words."""
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [("▁", -4.0), *((letter, -4.0) for letter in ascii_lowercase)]
    words = [("▁dog", -2.0), ("▁red", -2.0)]
    return T5TokenizerFast(vocab=[*special, *pieces, *words], extra_ids=0)


def t5_encoder(seed: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=40, **sizes)).eval()


def clip_tokenizer() -> Any:
    """A tokenizer of letters that reads `CLIP_TOKENS` tokens."""
    from transformers import CLIPTokenizer

    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    names = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def clip_encoder(seed: int, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    sizes = {"hidden_size": CLIP_WIDTH, "intermediate_size": 16, "projection_dim": 6}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=54,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **sizes,
        **layers,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def components(pipeline: str) -> dict[str, Any]:
    """Tokenizers and text encoders of a pipeline's class."""
    if pipeline.startswith("PixArt"):
        return {"tokenizer": t5_tokenizer(), "text_encoder": t5_encoder(0)}
    if pipeline == "FluxPipeline":
        return {
            "tokenizer": clip_tokenizer(),
            "text_encoder": clip_encoder(1, projected=False),
            "tokenizer_2": t5_tokenizer(),
            "text_encoder_2": t5_encoder(0),
        }
    return {
        "tokenizer": clip_tokenizer(),
        "text_encoder": clip_encoder(1, projected=True),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_2": clip_encoder(2, projected=True),
        "tokenizer_3": t5_tokenizer(),
        "text_encoder_3": t5_encoder(0),
    }


def write_pipeline(name: str, folder: Path) -> Any:
    """A pipeline that has its text encoders alone, and whose folder is written."""
    import inspect

    import diffusers

    cls, found = getattr(diffusers, name), components(name)
    others = [each for each in inspect.signature(cls).parameters if each not in found]
    pipeline = cls(**found, **dict.fromkeys(others))
    with quiet():
        pipeline.save_pretrained(folder)
    return pipeline
