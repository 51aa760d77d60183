"""A finished adapter on the Hugging Face hub, when the user asks for it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi


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
