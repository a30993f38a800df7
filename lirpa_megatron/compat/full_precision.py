"""Products of bounds are computed in the numbers' own type, whatever the caller has switched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_BACKENDS = [
    part
    for backend in (torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn)
    for part in (getattr(backend, "matmul", None), getattr(backend, "conv", None))
    if hasattr(part, "fp32_precision")
]
"""What has a precision of its own since torch 2.9."""


@contextlib.contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """No autocast, and no TF32 or bfloat16 for products of float32, while the block runs.

    Those round by up to 2^-9 of each term, which no bound here accounts for: a bound computed with
    them would be no bound. The caller's settings hold again afterwards.

    Args:
        device: where the products are computed.
    """
    given = [part.fp32_precision for part in _BACKENDS]
    legacy = None if _BACKENDS else torch.get_float32_matmul_precision()
    try:
        for part in _BACKENDS:
            part.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for part, precision in zip(_BACKENDS, given, strict=True):
            part.fp32_precision = precision
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
