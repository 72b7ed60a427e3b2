"""Text encoders of pipelines: equal to the pipeline's own call, and to T5 and CLIP by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_folders import (
    CLIP_TOKENS,
    WIDTH,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
    write_pipeline,
)
from safetensors.torch import load_file, save_file

from harness.errors import UsageError
from harness.networks import prompt_encoders
from harness.networks.prompt_encoders import PIPELINES, PromptEncoder

PROMPTS = ["A red dog ", "x", "the quick brown fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A pipeline and its folder, which is written once."""
    made: dict[str, tuple[Path, Any]] = {}

    def of(name: str) -> tuple[Path, Any]:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = path, write_pipeline(name, path)
        return made[name]

    return of


def expected(pipeline: Any, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a pipeline makes of the prompts, and of the empty negative prompt."""
    name = type(pipeline).__name__
    if name == "FluxPipeline":
        calls = [
            pipeline.encode_prompt(text, max_sequence_length=tokens) for text in (PROMPTS, [""])
        ]
        return tuple({"text": text, "pooled": pooled} for text, pooled, _ in calls)  # type: ignore[return-value]
    if name == "StableDiffusion3Pipeline":
        text, no_text, pooled, no_pooled = pipeline.encode_prompt(
            PROMPTS, None, None, max_sequence_length=tokens
        )
        return {"text": text, "pooled": pooled}, {"text": no_text, "pooled": no_pooled}
    text, mask, no_text, no_mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=tokens)
    return {"text": text, "mask": mask.bool()}, {"text": no_text, "mask": no_mask.bool()}


@pytest.mark.parametrize("name", PIPELINES)
def test_outputs_are_the_pipelines(name: str, folder: Callable[[str], tuple[Path, Any]]) -> None:
    path, pipeline = folder(name)
    encoder = PromptEncoder(path, tokens=12)
    with torch.no_grad():
        prompts, null = expected(pipeline, 12)
    found, none = encoder.encode(PROMPTS), encoder.encode([""])
    assert found.keys() == prompts.keys()
    for part in prompts:
        torch.testing.assert_close(found[part], prompts[part], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(none[part], null[part][:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("PixArtAlphaPipeline", 120),
        ("PixArtSigmaPipeline", 300),
        ("StableDiffusion3Pipeline", 256),
        ("FluxPipeline", 512),
    ],
)
def test_the_number_of_tokens_is_the_pipelines(
    name: str, tokens: int, folder: Callable[[str], tuple[Path, Any]]
) -> None:
    clip = CLIP_TOKENS if name == "StableDiffusion3Pipeline" else 0
    encoder = PromptEncoder(folder(name)[0])
    assert encoder.encode(["a dog"])["text"].shape == (1, clip + tokens, WIDTH)


def test_pixart_by_hand(folder: Callable[[str], tuple[Path, Any]]) -> None:
    """Lower case, padded to the number of tokens, and only the mask's keys are seen."""
    found = PromptEncoder(folder("PixArtAlphaPipeline")[0], tokens=12).encode(PROMPTS)
    texts = ["a red dog", "x", "the quick brown fox"]
    tokens = t5_tokenizer()(
        texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        text = t5_encoder(0)(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    torch.testing.assert_close(found["text"], text, rtol=1e-6, atol=1e-6)
    assert found["mask"].sum(1).tolist() == tokens.attention_mask.sum(1).tolist() == [5, 3, 12]


@pytest.mark.parametrize("name", PIPELINES)
def test_longer_prompts_are_found(name: str, folder: Callable[[str], tuple[Path, Any]]) -> None:
    """T5 reads 12 tokens with the last one its end, and CLIP 7 with both of its ends."""
    fits, cut = "x" * 10, "x" * 11
    assert len(t5_tokenizer()(fits).input_ids) == 12
    assert len(clip_tokenizer()("x" * 5).input_ids) == CLIP_TOKENS
    encoder = PromptEncoder(folder(name)[0], tokens=12)
    found = encoder.cut([fits, cut, "x" * 5])
    reading = PIPELINES[name]
    assert found == {**{each: [0, 1] for each in reading.clip}, reading.t5: [1]}
    same = encoder.encode([fits, cut])["text"]
    assert not torch.equal(same[0], encoder.encode(["x" * 9])["text"][0])
    torch.testing.assert_close(same[0], same[1], rtol=1e-6, atol=1e-6)  # the rest was cut


def test_another_encoder_is_another_identity(folder: Callable[[str], tuple[Path, Any]]) -> None:
    one, two = (folder(name)[0] for name in ("PixArtAlphaPipeline", "FluxPipeline"))
    first = PromptEncoder(one).identity
    assert first == PromptEncoder(one).identity
    assert first["encoder"] != PromptEncoder(two).identity["encoder"]
    assert first != PromptEncoder(one, tokens=12).identity


def test_a_tokenizer_of_pieces_needs_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers alone would say that tiktoken is missing."""
    write_pipeline("PixArtAlphaPipeline", tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer" / "spiece.model")
    monkeypatch.setattr(prompt_encoders, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="tokenizer needs sentencepiece to be read: pip install"):
        PromptEncoder(tmp_path)


def test_wrong_folders_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no readable model_index.json"):
        PromptEncoder(tmp_path)
    write_pipeline("PixArtAlphaPipeline", tmp_path)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    lost = next(name for name in state if name.endswith("wo.weight"))
    save_file({n: v for n, v in state.items() if n != lost}, weights, {"format": "pt"})
    with pytest.raises(UsageError, match=f"text_encoder lack {lost}"):
        PromptEncoder(tmp_path)
    weights.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="text_encoder cannot be read") as error:
        PromptEncoder(tmp_path)
    assert "\n" not in str(error.value)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipelin"}))
    with pytest.raises(UsageError, match="did you mean FluxPipeline"):
        PromptEncoder(tmp_path)


def test_unknown_characters_are_found(folder: Callable[[str], tuple[Path, Any]]) -> None:
    encoder = PromptEncoder(folder("StableDiffusion3Pipeline")[0])
    assert encoder.unknown(["a dog", "ein Bär", "1 dog"]) == [1, 2]


def test_half_weights_give_nearly_the_same(folder: Callable[[str], tuple[Path, Any]]) -> None:
    path = folder("FluxPipeline")[0]
    half = PromptEncoder(path, 12, dtype=torch.bfloat16).encode(PROMPTS)
    whole = PromptEncoder(path, 12).encode(PROMPTS)
    for part in whole:
        assert half[part].dtype == torch.float32
        error = (half[part] - whole[part]).norm() / whole[part].norm()
        assert 1e-5 < error < 0.03
