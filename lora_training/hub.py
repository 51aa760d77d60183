"""A finished adapter on the Hugging Face hub, when the user asks for it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_repository(repo: str) -> None:
    """Refuse, before anything is trained for it, a repository that cannot be pushed to; nothing is asked of the network.

    Raises:
        ValueError: its name is none, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: {error}") from error
    if get_token() is None:
        raise ValueError("push_to_hub needs a login on this machine: run `hf auth login`, or set HF_TOKEN.")


def push(repo: str, adapter: Path, folder: Path) -> str:
    """Upload the adapter file, its card and its samples; returns the repository's address.

    The repository is made, private, if it is not there. Nothing else of the run's folder leaves the machine.

    Args:
        repo: `owner/name`.
        adapter: the `.safetensors` file.
        folder: of the run, with README.md and samples.
    """
    hub = HfApi()
    address = hub.create_repo(repo, private=True, exist_ok=True)
    hub.upload_file(path_or_fileobj=adapter, path_in_repo=adapter.name, repo_id=repo, commit_message=f"Add {adapter.name}")
    hub.upload_folder(
        folder_path=folder,
        repo_id=repo,
        allow_patterns=["README.md", "samples/*.png"],
        commit_message=f"Card and samples of {adapter.name}",
    )
    return str(address)
