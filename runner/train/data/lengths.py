"""Tokens of every row's text, kept in the cache of `datasets`: a second start renders and tokenizes nothing.

What a length depends on is in its key: what the rows say and in which columns, the tokenizer, its chat
template, and the code that renders. What images add is `tokens`', and takes no time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import transformers
import trl
from datasets import Dataset, Features, Value
from transformers import ProcessorMixin

from runner.train.data.tokens import TokenCounter, Unfit

VERSION = 1
"""Of what is counted here; another one counts anew."""

_COUNTED = Features({"tokens": Value("int32"), "problem": Value("string")})

_BATCH = 1000


def text_lengths(
    rows: Dataset, counter: TokenCounter, processor: ProcessorMixin, digests: Iterable[str]
) -> list[int | Unfit]:
    """`TokenCounter.text_tokens` of every row.

    Args:
        rows: without images.
        digests: of what each row says.
    """
    key = _key(processor, rows.column_names, digests)
    if key is None:
        return [count for row in rows for count in counter.text_tokens([row])]
    counted = rows.map(
        _count,
        batched=True,
        batch_size=_BATCH,
        fn_kwargs={"counter": counter},
        remove_columns=rows.column_names,
        features=_COUNTED,
        new_fingerprint=key,
        desc="token counts",
    )
    pairs = zip(counted["tokens"][:], counted["problem"][:], strict=True)
    return [tokens if problem is None else Unfit(problem) for tokens, problem in pairs]


def _count(batch: dict[str, list[Any]], counter: TokenCounter) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    counts: Sequence[int | Unfit] = counter.text_tokens(rows)
    return {
        "tokens": [0 if isinstance(count, Unfit) else count for count in counts],
        "problem": [str(count) if isinstance(count, Unfit) else None for count in counts],
    }


def _key(processor: ProcessorMixin, columns: Sequence[str], digests: Iterable[str]) -> str | None:
    """What the lengths are known by; None for a tokenizer that cannot say what it is."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        return None
    parts = (
        str(VERSION),
        transformers.__version__,
        trl.__version__,
        type(processor).__name__,
        str(processor.chat_template or tokenizer.chat_template),
        str(tokenizer.special_tokens_map),
        tokenizer.backend_tokenizer.to_str(),
        str(sorted(columns)),  # the same turns are rendered otherwise as a prompt and its completion
    )
    digest = hashlib.sha256()
    for part in (*parts, *digests):
        digest.update(f"{len(part)}\n{part}\n".encode())
    return digest.hexdigest()
