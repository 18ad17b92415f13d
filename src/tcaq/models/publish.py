"""Put a checkpoint on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

from tcaq.errors import ModelError

LEFT_OUT = ["run/**", "evaluation/**", ".saving-*/**"]
"""What the folder of a checkpoint holds beside it: records of its making and images of its evaluation."""


def publish(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a checkpoint's files; the repository is made if there is none.

    Returns: the address of the upload. Raises: ModelError if the Hub cannot be reached or refuses.
    """
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(
            folder_path=folder, repo_id=repository, ignore_patterns=LEFT_OUT, commit_message="Quantized with tcaq"
        )
    except (
        OSError,
        HTTPError,
        LocalTokenNotFoundError,
        ValueError,
    ) as error:  # HTTPError: whichever client the Hub's has
        raise ModelError(
            f"cannot upload to {repository!r} at {hub.endpoint}: {error}. Check the name, the connection, and that you are "
            "logged in with the right to write there"
        ) from error
    return str(done)
