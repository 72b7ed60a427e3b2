"""The text encoders of a diffusers pipeline: from prompts to what its transformer takes.

The pipeline's own `encode_prompt` splits, pads and cuts prompts. So PixArt's are in lower case,
SD3's CLIP and T5 outputs stand one after the other, and FLUX's CLIP gives the pooled vector alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from harness.documents import parse_json, read_text
from harness.errors import UsageError, unknown
from harness.files import digest, file_hash
from harness.networks.library import PACKAGE, diffusers_for

INDEX = "model_index.json"
DOWNLOADED = (INDEX, "tokenizer*/*", "text_encoder*/*")
"""The files of a pipeline that encode prompts."""


@dataclass(frozen=True)
class Reading:
    """How a pipeline reads prompts.

    Attributes:
        clip: its CLIP tokenizers; CLIP reads as many tokens as its tokenizer says.
        t5: its T5 tokenizer; T5 reads as many tokens as `encode_prompt` is asked for.
        parts: what `encode_prompt` returns: text, mask, pooled, or "" for what is not used.
    """

    clip: tuple[str, ...]
    t5: str
    parts: tuple[str, ...]

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return (*self.clip, self.t5)

    @property
    def components(self) -> list[str]:
        """Tokenizers and text encoders, by their names in a pipeline."""
        encoders = [name.replace("tokenizer", "text_encoder") for name in self.tokenizers]
        return [*self.tokenizers, *encoders]


PIPELINES = {
    "PixArtAlphaPipeline": Reading((), "tokenizer", ("text", "mask")),
    "PixArtSigmaPipeline": Reading((), "tokenizer", ("text", "mask")),
    "StableDiffusion3Pipeline": Reading(
        ("tokenizer", "tokenizer_2"), "tokenizer_3", ("text", "", "pooled")
    ),
    "FluxPipeline": Reading(("tokenizer",), "tokenizer_2", ("text", "pooled")),
}


class PromptEncoder:
    """The text encoders of a pipeline's folder.

    Args:
        folder: a local folder with `model_index.json`, and a subfolder for each component.
        tokens: tokens that T5 reads; None is the pipeline's own number: 120 of PixArt-alpha, 300
            of PixArt-Sigma, 256 of SD3 and 512 of FLUX.
        dtype: of the encoders' weights.

    Raises UsageError for a folder that lacks something, or of a pipeline that is not known.
    """

    def __init__(
        self,
        folder: Path,
        tokens: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.folder, self.name = folder, pipeline_name(folder)
        self.reading, library = PIPELINES[self.name], diffusers_for("a text encoder")
        cls = getattr(library, self.name)
        found = {name: _component(folder, name, dtype) for name in self.reading.components}
        others = dict.fromkeys(n for n in inspect.signature(cls).parameters if n not in found)
        self.pipeline: Any = cls(**found, **others).to(device or torch.device("cpu"))
        asked = inspect.signature(self.pipeline.encode_prompt).parameters
        self.tokens: int = tokens or asked["max_sequence_length"].default
        known = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
        self.options = {name: value for name, value in known.items() if name in asked}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the transformer takes, for B prompts.

        Returns:
            `text` [B, length, width]; `mask` [B, length], bool, where the pipeline has one; and
            `pooled` [B, width] where it has one.
        """
        with quiet():
            outputs = self.pipeline.encode_prompt(
                prompt=list(prompts), max_sequence_length=self.tokens, **self.options
            )
        parts = zip(self.reading.parts, outputs, strict=False)
        found = {name: part.cpu() for name, part in parts if name}
        return {name: x.bool() if name == "mask" else x.float() for name, x in found.items()}

    @property
    def limits(self) -> dict[str, int]:
        """The tokens that are read, by tokenizer."""
        clip = dict.fromkeys(self.reading.clip, self.pipeline.tokenizer.model_max_length)
        return {**clip, self.reading.t5: self.tokens}

    def cut(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        """By tokenizer, the numbers of the prompts that are longer than it reads."""
        return {
            name: [i for i, ids in enumerate(self._ids(name, prompts)) if len(ids) > limit]
            for name, limit in self.limits.items()
        }

    def unknown(self, prompts: Sequence[str]) -> list[int]:
        """The numbers of the prompts with characters that T5 does not know; CLIP knows all."""
        name = self.reading.t5
        strange = getattr(self.pipeline, name).unk_token_id
        return [i for i, ids in enumerate(self._ids(name, prompts)) if strange in ids]

    def _ids(self, name: str, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of whole prompts, as the pipeline prepares them."""
        prepare = getattr(self.pipeline, "_text_preprocessing", list)
        return getattr(self.pipeline, name)(prepare(list(prompts)), verbose=False).input_ids

    @property
    def identity(self) -> dict[str, Any]:
        """The pipeline, the tokens, and one SHA-256 of the files of tokenizers and encoders."""
        files = [
            path
            for name in self.reading.components
            for path in sorted((self.folder / name).rglob("*"))
            if path.is_file()
        ]
        hashes = {str(path.relative_to(self.folder)): file_hash(path) for path in files}
        return {"pipeline": self.name, "tokens": self.tokens, "encoder": digest(hashes)}


def pipeline_name(folder: Path) -> str:
    """The class of a pipeline's folder. Raises UsageError for one that is not known."""
    try:
        content = parse_json(read_text(folder / INDEX))
        name = str(content["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} has no readable {INDEX}: give the folder of a diffusers pipeline"
        ) from error
    if name not in PIPELINES:
        raise unknown("pipeline", name, PIPELINES, str(folder / INDEX))
    return name


def _component(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A tokenizer or a text encoder of a folder.

    Raises UsageError if it is missing, cannot be read, or lacks weights.
    """
    where = folder / name
    if not where.is_dir():
        raise UsageError(f"there is no folder {where}: download the whole pipeline")
    pieces = not (where / "tokenizer.json").exists() and any(where.glob("*.model"))
    if pieces and find_spec("sentencepiece") is None:  # transformers would ask for tiktoken
        raise UsageError(f"{where} needs sentencepiece to be read: {PACKAGE}")
    cls = _class_of(folder, name)
    try:
        with quiet():
            if name.startswith("tokenizer"):
                return cls.from_pretrained(where, local_files_only=True, trust_remote_code=False)
            model, info = cls.from_pretrained(
                where,
                local_files_only=True,
                trust_remote_code=False,  # without it, transformers would ask
                dtype=dtype,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{where} cannot be read ({reason}): download it again") from error
    if lost := sorted({*info["missing_keys"], *map(str, info.get("mismatched_keys", ()))}):
        raise UsageError(f"the weights in {where} lack {', '.join(lost[:3])}: download them again")
    return model.eval().requires_grad_(False)


def _class_of(folder: Path, name: str) -> Any:
    """The class of transformers that a pipeline's index names for a component.

    Raises UsageError for anything that is neither a tokenizer nor a model.
    """
    import transformers

    content = parse_json(read_text(folder / INDEX))
    said = content.get(name)
    found = getattr(transformers, str(said[1]), None) if _is_pair(said) else None
    kinds = (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise UsageError(f"{folder / INDEX} names no class of transformers for {name}")
    return found


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers and transformers print no warnings and no bars."""
    import diffusers
    import transformers

    logs = [diffusers.utils.logging, transformers.utils.logging]
    before, bars = [log.get_verbosity() for log in logs], logs[1].is_progress_bar_enabled()
    try:
        for log in logs:
            log.set_verbosity_error()
        logs[1].disable_progress_bar()
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
        if bars:
            logs[1].enable_progress_bar()
