"""What an answer of S3 means, by its error code: the one place where botocore's exceptions become ours.

A missing right is never read as a missing object, and a bucket that is not there never as an empty one.
Nothing here calls the store.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

from runner.checkpoint.store import Missing, Transient, unfit
from runner.errors import AccessDenied, DataError, JobError, Problem, RunnerError, StorageError


class Meaning(Enum):
    """What follows from an answer."""

    ABSENT = auto()
    """No such key."""
    LOST = auto()
    """The condition does not hold."""
    AGAIN = auto()
    """May pass."""
    EXPIRED = auto()
    """Credentials that worked, or a clock; read them again."""
    DENIED = auto()
    NO_BUCKET = auto()
    REGION = auto()
    SHORT = auto()
    """The object ends before the range begins."""
    UNFIT = auto()
    """No conditional writes."""
    REFUSED = auto()
    """Anything else: no second try would help."""


_CODES = {
    "NoSuchKey": Meaning.ABSENT,
    "NoSuchBucket": Meaning.NO_BUCKET,
    "PreconditionFailed": Meaning.LOST,
    "ConditionalRequestConflict": Meaning.AGAIN,
    "OperationAborted": Meaning.AGAIN,
    "ExpiredToken": Meaning.EXPIRED,
    "ExpiredTokenException": Meaning.EXPIRED,
    "TokenRefreshRequired": Meaning.EXPIRED,
    "RequestTimeTooSkewed": Meaning.EXPIRED,
    "PermanentRedirect": Meaning.REGION,
    "AuthorizationHeaderMalformed": Meaning.REGION,
    "IllegalLocationConstraintException": Meaning.REGION,
    "NotImplemented": Meaning.UNFIT,
    "InvalidRange": Meaning.SHORT,
    "RequestTimeout": Meaning.AGAIN,
    "SlowDown": Meaning.AGAIN,
    "Throttling": Meaning.AGAIN,
    "ThrottlingException": Meaning.AGAIN,
    "RequestLimitExceeded": Meaning.AGAIN,
    # The body was damaged on its way.
    "BadDigest": Meaning.AGAIN,
    "InvalidDigest": Meaning.AGAIN,
    "IncompleteBody": Meaning.AGAIN,
    "XAmzContentSHA256Mismatch": Meaning.AGAIN,
    "XAmzContentChecksumMismatch": Meaning.AGAIN,
}

_STATUS = {
    301: Meaning.REGION,
    404: Meaning.ABSENT,
    409: Meaning.AGAIN,
    412: Meaning.LOST,
    416: Meaning.SHORT,
    429: Meaning.AGAIN,
    501: Meaning.UNFIT,
}
"""Of answers without a code that says more; those to HEAD never have one."""


def meaning(code: str, status: int, worked: bool) -> Meaning:
    """What an error answer means.

    code                                     status     worked   meaning
    in `_CODES`                              any        any      as there
    anything else                            401, 403   no       DENIED
    anything else                            401, 403   yes      EXPIRED: rights do not vanish by themselves
    anything else                            5xx        any      AGAIN, but 501
    anything else                            _STATUS    any      as there
    anything else                            others     any      REFUSED

    Args:
        worked: this operation of this process has succeeded before.
    """
    if code in _CODES:
        return _CODES[code]
    if status in (401, 403):
        return Meaning.EXPIRED if worked else Meaning.DENIED
    if status in _STATUS:
        return _STATUS[status]
    return Meaning.AGAIN if status >= 500 else Meaning.REFUSED


def answered(operation: str, key: str, place: str, answer: Any, worked: bool) -> tuple[Meaning, RunnerError]:
    """The meaning of a `ClientError.response`, and the exception to raise for it.

    Args:
        operation: of the S3 API, `PutObject`.
        key: relative to `place`.
    """
    error = answer.get("Error", {})
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.get("Code", status))
    what = meaning(code, status, worked)
    message = error.get("Message") or "no reason given"
    said = f"{operation} {place}/{key}: {code} ({status}): {message}"
    if what in (Meaning.DENIED, Meaning.EXPIRED):
        denied = AccessDenied(f"{said}; remedy: {_denied_remedy(code, place)}")
        return what, denied if what is Meaning.DENIED else Transient(denied)
    if what is Meaning.NO_BUCKET:
        reason = f"{place}: there is no such bucket"
        remedy = "create it, or correct the name; for a store that is not Amazon's, set AWS_ENDPOINT_URL"
        return what, JobError([Problem("checkpoints.uri", reason, remedy)])
    if what is Meaning.REGION:
        region = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        named = region or error.get("Region") or "the bucket's region"
        reason = f"{place}: the bucket is in another region than this client ({said})"
        return what, JobError([Problem("checkpoints.uri", reason, f"set AWS_REGION to {named}")])
    if what is Meaning.UNFIT:
        return what, unfit(place, said)
    if what is Meaning.ABSENT:
        return what, Missing(f"{operation} {place}/{key}: no such object")
    if what is Meaning.SHORT:
        return what, DataError(f"{place}/{key}: the object has fewer bytes than it should")
    if what is Meaning.REFUSED:
        return what, StorageError(
            f"{said}; remedy: see what the store says, then give the same command again"
        )
    return what, Transient(silent(said))


def silent(said: str) -> StorageError:
    """What a failure becomes that does not pass."""
    return StorageError(
        f"{said}; remedy: check the store and the network, then give the same command again; it goes on from "
        "the last checkpoint"
    )


def _denied_remedy(code: str, place: str) -> str:
    match code:
        case "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired":
            return "the session's token has expired: renew it (aws sso login, or a new token)"
        case "RequestTimeTooSkewed":
            return "set the clock of this machine"
        case "InvalidAccessKeyId" | "SignatureDoesNotMatch":
            return "the access key or its secret is wrong: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return (
        f"grant s3:GetObject, s3:PutObject, s3:DeleteObject on {place}/*, and s3:ListBucket on the bucket: "
        "without that last right S3 answers 403 for an object that does not exist"
    )
