"""Pushing to the Hub, step by step, so that an error can say how far it came."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

_UNCHANGED = "Its files are as they were before."


class PushError(OSError):
    """A push that failed. Its text says at which step, what is in the repository, and what to do."""


def push(
    save: Callable[[Path], None],
    describe: Callable[[Path, str], None],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put a folder into a repository, which is made if it is not there, in one commit: all of it arrives, or nothing.

    Args:
        save (`Callable`): called as `save(folder)` with a temporary folder; what is there in the end is pushed.
        describe (`Callable`): called as `describe(file, repo_id)` with the README.md in that folder: the repository's, where
            it has one, else the one that `save` left, if any.
        repo_id (`str`): `"user/name"`, or a name of the user's own.
        commit_message, commit_description, private, token, revision, create_pr: as transformers' `push_to_hub`.

    Raises:
        `PushError`: where a step failed.
    """
    api = HfApi(token=token, library_name="idp-peft")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(folder)
        with _step("create the repository", repo_id, "Nothing was changed."):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            with _step(f"create the branch {revision!r}", repo_id, _UNCHANGED):
                _create_branch(api, repo_id, revision, create_pr)
        with _step("read the model card", repo_id, _UNCHANGED):
            _fetch_card(repo_id, folder / "README.md", revision, token)
        describe(folder / "README.md", repo_id)
        with _step("check the model card", repo_id, _UNCHANGED):
            _check_card(api, folder / "README.md", token)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
        where = {"revision": revision, "create_pr": create_pr}
        with _step("upload the weights", repo_id, f"{_UNCHANGED} What was uploaded is kept and not sent again."):
            api.preupload_lfs_files(repo_id, added, **where)
        with _step("commit", repo_id, _UNCHANGED):
            return api.create_commit(
                repo_id, added, commit_message=commit_message, commit_description=commit_description, **where
            )


def _fetch_card(repo_id: str, file: Path, revision: str | None, token) -> None:
    # Not the cached one when the Hub cannot be reached: what others wrote on the Hub would be lost.
    with contextlib.suppress(RemoteEntryNotFoundError):
        card = hf_hub_download(repo_id, "README.md", revision=revision, token=token, force_download=True)
        shutil.copyfile(card, file)


def _check_card(api: HfApi, file: Path, token) -> None:
    """Ask the Hub before anything is sent. (`RepoCard.validate` of older versions asks huggingface.co alone.)"""
    content = {"repoType": "model", "content": file.read_text(encoding="utf-8")}
    answer = get_session().post(
        f"{api.endpoint}/api/validate-yaml", json=content, headers=build_hf_headers(token=token)
    )
    if answer.status_code == 400:
        errors = [error.get("message") for error in answer.json().get("errors", [])]
        raise ValueError(f"the metadata of README.md is refused: {'; '.join(map(str, errors))}")
    hf_raise_for_status(answer)


def _create_branch(api: HfApi, repo_id: str, revision: str, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    except HfHubHTTPError as error:
        # Without access a pull request can still be made to a branch that exists.
        if not (create_pr and error.response.status_code == 403):
            raise


@contextlib.contextmanager
def _step(doing: str, repo_id: str, state: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub library raises errors of whichever HTTP library, or storage, its version uses
        cause = error
        while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if doing == "commit" and (status is None or status >= 500):
            state = "It is not known whether the commit arrived: either all of it is there, or nothing."
        raise PushError(
            f"the push to {repo_id} failed at the step '{doing}': {_reason(cause)}. {state} {_advice(cause, status)}"
        ) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(getattr(error, "server_message", None) or error).splitlines() if line.strip()]
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = (lines[0] if lines else type(error).__name__).rstrip(".")
    return text if status is None or str(status) in text else f"{status}, {text}"


def _advice(error: Exception, status: int | None) -> str:
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return "Log in with a token that may write there (`hf auth login`), or give another repository."
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return "Correct it and push again."
    return "Push again when the Hub can be reached: what is there already is not sent twice."
