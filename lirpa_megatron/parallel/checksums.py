"""Whether ranks or stages hold the same values: checksums, and an error that names what differs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lirpa_megatron.errors import SPMDError


def checksums(values: Mapping[str, torch.Tensor | str | None]) -> dict[str, int | str]:
    """What `check_same` compares of named tensors and texts: plain data."""
    return {
        name: _checksum(value) if isinstance(value, torch.Tensor) else str(value)
        for name, value in values.items()
    }


def check_same(
    gathered: Sequence[Mapping[str, int | str]], whose: str, remedy: str
) -> None:
    """Raises if the checksums of anyone differ from the first one's.

    Args:
        gathered: `checksums` of all of them, in order.
        whose: what they are, for the message.
        remedy: what the user can do.

    Raises:
        SPMDError: naming the values, and who differs.
    """
    for i, theirs in enumerate(gathered):
        names = sorted(set(theirs) | set(gathered[0]))
        wrong = [n for n in names if theirs.get(n) != gathered[0].get(n)]
        if wrong:
            shown = [_shown(n, gathered[0].get(n), theirs.get(n)) for n in wrong[:3]]
            raise SPMDError(
                f"{', '.join(shown)} differs between {whose} 0 and {i}: {remedy}"
            )


def _shown(name: str, first: Any, other: Any) -> str:
    texts = isinstance(first, str) and isinstance(other, str)
    return f"{name} ({first} and {other})" if texts else name


def _checksum(x: torch.Tensor) -> int:
    """A checksum of the bits of `x` that also depends on their order."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.detach().contiguous().view(integers[x.element_size()]).flatten().to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device, dtype=torch.int64)
    header = zlib.crc32(f"{tuple(x.shape)}{x.dtype}".encode())
    return int((bits * weights).sum().item()) ^ header
