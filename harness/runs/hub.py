"""The Hugging Face hub: an exported student is uploaded there."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UsageError


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads an exported student and returns the address of its page.

    Args:
        repository: OWNER/NAME; it is made if it does not exist.

    Raises UsageError for a folder without a model card, and if the hub refuses or is out of reach.
    """
    if not (folder / "README.md").is_file():
        raise UsageError(
            f"{folder} has no README.md: give a folder that `harness student export` wrote"
        )
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
        )
    except ImportError as error:
        raise UsageError("push needs huggingface_hub: pip install huggingface_hub") from error
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (LocalTokenNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise UsageError(
            f"the hub refused {repository} ({_first_line(error)}): log in by `hf auth login`, and "
            "give a repository that you may write"
        ) from error
    except Exception as error:
        if not no_network(error):
            raise
        raise UsageError(
            f"the hub cannot be reached ({_first_line(error)}); {folder} is unchanged, so push it "
            "when you are online"
        ) from error
    return f"https://huggingface.co/{repository}"


def no_network(error: Exception) -> bool:
    """Whether an error is a lost network, or HF_HUB_OFFLINE.

    The hub's client is requests, httpx or httpx2, by its version, and they share no class.
    """
    names = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, OSError) or "TransportError" in names


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
