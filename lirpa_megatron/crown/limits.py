"""Sizes that are chosen by measurement."""

from __future__ import annotations

CACHE = 2**24
"""Bytes of A that CPU passes carry at once, shared by the ranks: more of them leave the processor's
cache between operators (16 MiB was the fastest of 2 to 128 for a transformer on 2 cores)."""

FORM_LIMIT = 2**26
"""Numbers in the affine form of one node (`OwnOptions.form_limit`)."""
