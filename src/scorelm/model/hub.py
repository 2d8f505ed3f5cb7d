"""The Hugging Face hub: models that are fetched from it and pushed to it, with every refusal in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from scorelm.errors import InputError, brief

PATIENCE = 10.0
"""Seconds that the hub has for its first answer; without a limit, one that is silent is waited for for ever."""


def is_hub_name(name: str) -> bool:
    """Whether a name can be one on the hub: ``user/name``, ``name``, or either with ``@revision`` behind it."""
    try:
        validate_repo_id(name.partition("@")[0])
    except HFValidationError:
        return False
    return True


def fetch(name: str, files: list[str], options: dict[str, Any]) -> Path:
    """Fetch files of a model, or find them in the cache where the hub does not answer.

    Args:
        name: ``user/name``, or ``user/name@revision`` for a branch, a tag or a commit.
        files: which of its files; those that it has not are left out.
        options: of `huggingface_hub.snapshot_download`.

    Returns:
        The directory that they are in.

    Raises:
        InputError: no such model or revision, no right to read it, or the hub cannot be reached.
    """
    what = f"no model at {brief(repr(name))}: it is no directory"
    if not is_hub_name(name):
        raise InputError(f"{what}, and on the hub names are user/name or user/name@revision")
    repository, _, revision = name.partition("@")
    if revision and options.setdefault("revision", revision) != revision:
        raise InputError(f"{name} names a revision, and {brief(options['revision'])} is another: give one of them")
    with refusing(f"{what}, and"):
        if not options.get("local_files_only"):
            try:
                knock(HfApi(options.get("endpoint"), options.get("token")), repository, options.get("revision"))
            except RevisionNotFoundError:
                raise
            except Exception as error:  # what the client's own client raises is another in every version
                with suppress(Exception):
                    return Path(snapshot_download(repository, allow_patterns=files, **options | OFFLINE))
                raise error from None
        return Path(snapshot_download(repository, allow_patterns=files, **options))


OFFLINE = {"local_files_only": True}


def push(
    save: Callable[[Path], object],
    name: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Put a directory on the hub in one commit, in a repository that is made if there is none.

    Args:
        save: writes the files to a directory.
        name: ``user/name``.
        private: whether a new repository is for its owner only.
        branch: to commit to, made if there is none; main by default.
        message: of the commit.
        token: by default HF_TOKEN, or what ``hf auth login`` has kept.

    Returns:
        The address of the commit.

    Raises:
        InputError: no name for a repository, no token or one that does not allow it, or the hub cannot be reached.
    """
    what = f"cannot push to {brief(repr(name))}:"
    if "@" in name or "/" not in name or not is_hub_name(name):
        raise InputError(f"{what} give user/name, of letters, digits, '-', '_' and '.'")
    with refusing(what):
        if token is None and get_token() is None:
            raise LocalTokenNotFoundError
        api = HfApi(token=token)
        with suppress(RepositoryNotFoundError):
            knock(api, name)
        api.create_repo(name, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        with TemporaryDirectory() as directory:
            save(Path(directory))
            said = message or "Push a scorelm model"
            return api.upload_folder(
                repo_id=name, folder_path=directory, revision=branch, commit_message=said,
                delete_patterns="tokenizer.*",  # that of an earlier model may be of another kind
            ).commit_url  # fmt: skip


def knock(api: HfApi, name: str, revision: str | None = None) -> None:
    """Ask for a model, only to see that the hub answers in time; raises what its client raises."""
    api.model_info(name, revision=revision, timeout=PATIENCE)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn what the hub's client raises, a dozen unrelated types, into one line that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} {reason(error)}") from None


def reason(error: Exception) -> str:
    """Why the hub, or its client, refuses something, and what to do about it."""
    if isinstance(error, RevisionNotFoundError):
        return "the hub has the model, but not this revision"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or only for those who give a token: set HF_TOKEN, or run hf auth login"
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "the hub wants a token that is valid: set HF_TOKEN, or run hf auth login"
    if status == 403:
        return "the token does not allow it: make one that may write there, or choose another name"
    if isinstance(error, LocalEntryNotFoundError):
        return "the hub was not to be asked, and it is not in the cache"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps it from asking the hub"
    return f"asking {constants.ENDPOINT} failed: {brief(' '.join(str(error).split()) or type(error).__name__)}"
