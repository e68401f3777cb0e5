"""Upload an exported folder to the Hugging Face hub, or to the server that HF_ENDPOINT names."""

import re
from pathlib import Path

from karat_scale.errors import UserError, one_line


def check_push(repository: str) -> None:
    """Raise UserError if the name is no USER/NAME, or nobody is logged in; before anything is exported."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise UserError(f"--push {repository}: should be USER/NAME, such as jane/owls")
    if get_token() is None:
        raise UserError(f"--push {repository}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Upload all files in one commit. Returns the repository's address.

    Args:
        private: make it private if there is none yet; else it is as its owner's are.

    Raises:
        UserError: the hub refuses it or cannot be reached; the same command tries again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by karat export")
    except Exception as error:  # of the hub's client, and of the HTTP library below it
        raise UserError(f"--push {repository}: {one_line(error)}; nothing else is lost, try again") from error
    return str(url)
