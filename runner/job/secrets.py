"""What looks like a credential, so that none stands in a job and none is ever printed.

A job is stored with its run, printed, diffed and committed; a secret in it leaks. The patterns are the
public prefixes of their issuers, so that a commit id or a file name is not taken for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VALUE = re.compile(
    r"""
    \bhf_[A-Za-z0-9]{16,}                                  # Hugging Face
    | \b(?:AKIA|ASIA)[0-9A-Z]{12,}                         # AWS access key id
    | \bgh[pousr]_[A-Za-z0-9]{16,} | \bgithub_pat_\w{16,}  # GitHub
    | \bglpat-[\w-]{16,}                                   # GitLab
    | \bsk-[A-Za-z0-9_-]{16,}                              # OpenAI, Anthropic
    | \bxox[abprs]-[A-Za-z0-9-]{10,}                       # Slack
    | \bAIza[0-9A-Za-z_-]{30,}                             # Google
    | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}[\w.-]*                # JSON web token
    | -----BEGIN[ A-Z]*PRIVATE\ KEY-----[^-]*(?:-----END[ A-Z]*-----)?
    | (?<=://)[^/\s:@]+:[^/\s@]+(?=@)                      # user:password in a URL
    """,
    re.VERBOSE,
)

_KEY = re.compile(
    r"(^|_)(password|passwd|passphrase|secret|credentials?|private_key|api_?key|access_key(_id)?)(_|$)"
    r"|^token$|(^|_)(hf|hub|auth|access|api|session|bearer|refresh|github|wandb)_?token$"
)
"""Not every `..._token`: `image_token`, `eos_token` and `max_new_tokens` are words of the field."""

MASK = "[secret]"

_SHORTEST = 8
"""Characters of a variable's value; a shorter one would also be found inside words."""


def has_secret(value: str) -> bool:
    """Whether the text holds something that looks like a credential."""
    return _VALUE.search(value) is not None


def names_secret(key: str) -> bool:
    """Whether the key is a name for a credential."""
    return _KEY.search(key.lower()) is not None


def mask(text: str) -> str:
    """The text with every credential replaced."""
    return _VALUE.sub(MASK, text)


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """The text without what looks like a credential, and without the values of variables that are one."""
    for name, value in environ.items():
        if (names_secret(name) or name.upper().endswith(("TOKEN", "KEY"))) and len(value) >= _SHORTEST:
            text = text.replace(value, MASK)
    return mask(text)
