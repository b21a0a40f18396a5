"""An export as a repository of the hub: huggingface_hub's own upload, and its failures as exit codes.

The token comes from the environment or from huggingface_hub's own login, and is never seen here. What the end
of an export needs is asked for at its beginning (`check`), before hours are spent.

    no token, 401, 403, a token that only reads      AccessDenied 77
    no such namespace, a repository that is public   AccessDenied 77, UsageError 64
    the hub refuses what is uploaded (400, 422)      DataError 65
    any other answer, no network, HF_HUB_OFFLINE     StorageError 74
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from runner.errors import AccessDenied, DataError, StorageError, UsageError

_TOKEN = "set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"


def check(repo: str) -> None:
    """Whether somebody is known to the hub who may write.

    Raises:
        UsageError: `repo` is no id.
        AccessDenied, StorageError: as the module says.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _failures(repo, None):
        validate_repo_id(repo)
        known = HfApi().whoami()
    role = known.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise AccessDenied(
            f"push to {repo}: the token of {known.get('name')} may only read; remedy: {_TOKEN}"
        )


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload a folder, as one commit. Returns its address.

    Args:
        public: whether everybody may see a repository that is made for it.

    Raises:
        UsageError: the repository is there, and public, and `public` does not say so.
        AccessDenied, DataError, StorageError: as the module says.
    """
    from huggingface_hub import HfApi

    with _failures(repo, folder, public):
        api = HfApi()
        made = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and api.repo_info(repo).private is False:
            raise UsageError(
                f"push to {repo}: it is there already, and everybody sees it; {folder} was written and stays "
                f"here\n    remedy: if they shall see this, too: {upload(repo, folder, public=True)}"
            )
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload of vlm-runner export")
    return str(made)


def upload(repo: str, folder: Path, public: bool) -> str:
    """huggingface_hub's own command for the same."""
    return f"hf upload {repo} {shlex.quote(str(folder))} .{'' if public else ' --private'}"


@contextlib.contextmanager
def _failures(repo: str, folder: Path | None, public: bool = False) -> Iterator[None]:
    """Map what huggingface_hub raises.

    Args:
        folder: what is whole by now, and stays.
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        BadRequestError,
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    again = ""
    if folder is not None:
        again = f"; {folder} is whole and stays, for another try: {upload(repo, folder, public)}"
    what = f"push to {repo}"
    try:
        yield
    except HFValidationError as error:
        said = str(error).splitlines()[0]
        raise UsageError(f"{what}: it is no id of the hub: {said}\n    remedy: write user/name") from error
    except LocalTokenNotFoundError as error:
        raise AccessDenied(f"{what}: the hub wants to know who it is; remedy: {_TOKEN}{again}") from error
    except OfflineModeIsEnabled as error:
        raise StorageError(f"{what}: HF_HUB_OFFLINE is set; remedy: unset it{again}") from error
    except BadRequestError as error:
        raise DataError(f"{what}: the hub refuses it: {_said(error)}; remedy: as it says{again}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise AccessDenied(
                f"{what}: the hub answers {status}: {_said(error)}; remedy: {_TOKEN}, and check that it may "
                f"write there{again}"
            ) from error
        if status in (409, 413, 422):
            raise DataError(
                f"{what}: the hub answers {status}: {_said(error)}; remedy: as it says{again}"
            ) from error
        raise StorageError(f"{what}: the hub answers {status}; remedy: try again later{again}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        # RuntimeError: hf_xet's, written in Rust, has no better.
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise StorageError(
            f"{what}: the hub cannot be reached ({why}); remedy: check the network and the proxy{again}"
        ) from error


def _said(error: Exception) -> str:
    """The hub's own words, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
