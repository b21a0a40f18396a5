"""A snapshot of a hub repository, and the one place where the hub's exceptions become exit codes.

Without a network, what the cache has whole is taken. Only `runner.supervisor.fetch` calls this.
"""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from runner.durable import disk_error
from runner.errors import AccessDenied, DataError, RunnerError, StorageError

Kind = Literal["model", "dataset"]
Say = Callable[[Mapping[str, Any]], None]
"""Takes events of the download."""

_WEIGHTS = "*.safetensors"
_MODEL_FILES = [_WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja"]
"""Nothing that executes: no pickles, no code; and not the copies for other frameworks."""
_MODEL_IGNORED = ["onnx/*", "original/*", "*.onnx", "runs/*"]


def snapshot(kind: Kind, path: str, revision: str, say: Say, weights: bool = True) -> Path:
    """Download a repository, or complete what the cache has of it. Returns a folder named for the commit.

    Args:
        weights: False leaves a model's weights where they are.

    Raises:
        DataError: no such repository or revision.
        AccessDenied: the hub wants credentials or consent.
        StorageError: the network or the disk, and the cache does not have it either.
    """
    # Imported here: half a second that only a job with a hub id pays.
    from httpx2 import HTTPError
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"fetch {kind} {path}"
    token = "set HF_TOKEN to a token that may read it (https://huggingface.co/settings/tokens)"
    try:
        folder = snapshot_download(
            path,
            repo_type=kind,
            revision=revision,
            allow_patterns=_MODEL_FILES[0 if weights else 1 :] if kind == "model" else None,
            ignore_patterns=_MODEL_IGNORED if kind == "model" else None,
            tqdm_class=_progress(say),
        )
    except GatedRepoError as error:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{path}"
        remedy = f"accept its conditions at {page}, and {token}"
        raise AccessDenied(f"{what}: it is gated; remedy: {remedy}") from error
    except RepositoryNotFoundError as error:
        local = f"there is no folder {Path(path).absolute()} either"
        if error.response.status_code == 401:
            raise AccessDenied(
                f"{what}: the hub answers 401: it does not exist, or it is private; {local}; remedy: check "
                f"the spelling, or {token}"
            ) from error
        missing = f"there is no such {kind} on the hub; {local}"
        raise DataError(f"{what}: {missing}; remedy: check the spelling") from error
    except RevisionNotFoundError as error:
        remedy = "name a branch, tag or commit of it"
        raise DataError(f"{what}: it has no revision {revision!r}; remedy: {remedy}") from error
    except DisabledRepoError as error:
        raise AccessDenied(f"{what}: the hub has disabled it; remedy: use another {kind}") from error
    except HFValidationError as error:
        reason = f"it is no hub id and nothing is there: {error}"
        raise DataError(f"{what}: {reason}; remedy: correct the path") from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _http_error(what, cause, token) from error
        if constants.HF_HUB_OFFLINE:
            raise StorageError(
                f"{what}: HF_HUB_OFFLINE is set and it is not complete in {constants.HF_HUB_CACHE}; remedy: "
                "unset it, or fill the cache where there is a network"
            ) from error
        raise _no_network(what, cause or error) from error
    except HfHubHTTPError as error:
        raise _http_error(what, error, token) from error
    except HTTPError as error:
        raise _no_network(what, error) from error
    except OSError as error:
        raise disk_error(what, Path(constants.HF_HUB_CACHE), error) from error
    return Path(folder)


def weight_sizes(path: str, revision: str) -> dict[str, int] | None:
    """Bytes of a model's files of weights by their names, as the hub lists them; None where it does not."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().model_info(path, revision=revision, files_metadata=True).siblings or []
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError):
        return None
    return {
        file.rfilename: int(file.size or 0)
        for file in found
        if fnmatch.fnmatch(file.rfilename, _WEIGHTS)
        and not any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in _MODEL_IGNORED)
    }


def _http_error(what: str, error: Any, token: str) -> RunnerError:
    """`error`: huggingface_hub's HfHubHTTPError."""
    status = error.response.status_code
    if status in (401, 403):
        return AccessDenied(f"{what}: the hub answers {status}; remedy: {token}")
    return StorageError(f"{what}: the hub answers {status}; remedy: give the same command again later")


def _no_network(what: str, error: BaseException) -> StorageError:
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    return StorageError(
        f"{what}: the hub cannot be reached ({why}), and it is not complete in the cache; remedy: check the "
        "network and the proxy, then give the same command again"
    )


def _progress(say: Say) -> type:
    """The hub's progress bar as events: bytes that are on the disk."""
    from tqdm.auto import tqdm

    class Progress(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **settings: Any) -> None:
            self._silent = settings.get("unit") != "B" or settings.get("desc") == "Downloading bytes"
            super().__init__(*args, **{**settings, "file": io.StringIO(), "mininterval": 0.5})

        def display(self, *args: Any, **settings: Any) -> bool:
            if not self._silent and self.total:
                say({"event": "progress", "phase": "fetch", "done": int(self.n), "total": int(self.total)})
            return True

    return Progress
