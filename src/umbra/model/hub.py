"""Uploading an adapter folder to the hub."""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo


def upload(
    save: Callable[[str], None], repo_id: str, *, private: bool | None, token: str | bool | None, revision: str | None,
    create_pr: bool, **commit: Any,
) -> CommitInfo:  # fmt: skip
    """Write an adapter folder and upload it to a repository, which is created if it does not exist.

    Args:
        save: writes the folder.
        repo_id: the repository.
        private: as in huggingface_hub, like all arguments below.
        token: of the user.
        revision: a branch, which is created as well.
        create_pr: whether to open a pull request.
        commit: ``commit_message`` and ``commit_description``.
    """
    api = huggingface_hub.HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repository, branch=revision, exist_ok=True)
    with TemporaryDirectory() as scratch:
        save(scratch)
        return api.upload_folder(
            repo_id=repository, folder_path=scratch, revision=revision, create_pr=create_pr, **commit
        )
