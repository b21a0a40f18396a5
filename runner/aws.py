"""Clients of Amazon's services, set up in one way; boto3 is imported by the first.

Endpoint, region, credentials, CA bundle and proxies are boto3's own: `AWS_ENDPOINT_URL`, profiles and roles,
`AWS_CA_BUNDLE`, `HTTPS_PROXY`; `AWS_REGION` goes before them. botocore's retries are off: whoever sends a
request that must not be repeated blindly says what a second one means.
"""

from __future__ import annotations

import os
from typing import Any

from runner.errors import AccessDenied


def client(service: str, region: str | None = None, **config: Any) -> Any:
    """A client with a session of its own: boto3's default one is not made for threads, and keeps old
    credentials.

    Args:
        region: before that of the environment.
        config: more of botocore's `Config`.

    Raises:
        ValueError: an endpoint or a region that is none.
        OSError: a file with credentials cannot be read.
        BotoCoreError: the credentials are unusable; see `unusable`.
    """
    import boto3
    from botocore.config import Config

    settings = Config(
        retries={"total_max_attempts": 1, "mode": "standard"}, connect_timeout=10, read_timeout=20, **config
    )
    session = boto3.session.Session()
    if (credentials := session.get_credentials()) is not None:
        credentials.get_frozen_credentials()  # what is wrong with them is found here, not in a request
    # Every other SDK of Amazon's reads AWS_REGION, and platforms set it; boto3 has AWS_DEFAULT_REGION alone.
    return session.client(service, region_name=region or os.environ.get("AWS_REGION"), config=settings)


def unusable(error: Exception, said: str) -> AccessDenied | None:
    """The refusal when a `BotoCoreError` is about credentials, else None.

    Args:
        said: the request, for the message.
    """
    from botocore import exceptions as botocore

    if isinstance(error, botocore.NoCredentialsError):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role for this machine"
        return AccessDenied(f"{said}: no credentials were found; remedy: {remedy}")
    kinds = (
        botocore.ConfigNotFound,
        botocore.ConfigParseError,
        botocore.CredentialRetrievalError,
        botocore.InvalidConfigError,
        botocore.PartialCredentialsError,
        botocore.ProfileNotFound,
        botocore.SSOError,
        botocore.TokenRetrievalError,
    )
    if isinstance(error, kinds):
        remedy = "correct AWS_PROFILE, the variables AWS_* or ~/.aws, or log in again (aws sso login)"
        return AccessDenied(f"{said}: no usable credentials: {error}; remedy: {remedy}")
    return None
