"""Imported before all else of a process that trains: it imports what would cost a start more than it needs.

bitsandbytes (0.50) decorates its fallbacks with `torch.compile` while it is imported, which loads the whole
of inductor: about a second of every start, for functions that neither a GPU nor an x86 CPU calls. Here they
are compiled when they are first called. It can go when bitsandbytes does so itself; tests/test_upstream.py
says when.

The large libraries are imported without garbage collection: modules are no garbage, and to look through a
million of their objects again and again is a sixth of the time. What they made is not looked at later either.
"""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable
from typing import Any


def _import_libraries() -> None:
    """What every process of `runner.train` imports anyway; after it, what is there is not collected from."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        _import_bitsandbytes()
        for name in ("transformers.modeling_utils", "peft", "datasets"):
            importlib.import_module(name)
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def _import_bitsandbytes() -> None:
    """Without inductor."""
    import torch

    compile_now = torch.compile
    torch.compile = functools.partial(_when_called, compile_now)
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile_now


def _when_called(
    compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """`torch.compile`, or its decorator with options, at the first call."""
    if function is None:
        return functools.partial(_when_called, compile_now, **options)

    @functools.cache
    def compiled() -> Any:
        return compile_now(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


_import_libraries()
