"""The optional libraries diffusers and peft, and the hub where its folders lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import UsageError

PACKAGE = "pip install 'distillation-harness[diffusers]'"


def diffusers_for(what: str) -> Any:
    """The library diffusers. Raises UsageError without it.

    Args:
        what: what needs it, as an error names it.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"{what} needs diffusers: {PACKAGE}") from error
    return diffusers


def peft_for(what: str) -> Any:
    """The library peft. Raises UsageError without it.

    Args:
        what: what needs it, as an error names it.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"{what} needs peft: {PACKAGE}") from error
    return peft


def hub_folder(name: str, patterns: Sequence[str]) -> Path:
    """The local copy of a repository on the hub; it is downloaded if it is not cached.

    Args:
        patterns: the files that are wanted.

    Raises UsageError if it is neither cached nor reachable, or if the hub does not have it.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UsageError(f"{name} on the hub needs diffusers: {PACKAGE}") from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HfHubHTTPError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"the hub has no {name} for you: {reason}") from error
    except OSError as error:
        raise UsageError(
            f"{name} is neither a file nor a folder here, nor in the cache of the hub, "
            "and the hub cannot be reached: give a local file or folder"
        ) from error
