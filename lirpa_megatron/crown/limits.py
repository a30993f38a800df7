"""Sizes that are chosen by measurement."""

from __future__ import annotations

CACHE = 2**24
"""Bytes of A that a CPU pass carries at once, on all ranks together. More would not stay in the
processor's cache between operators (for a transformer on 2 cores, 16 MiB was the fastest of 2 to
128)."""

FORM_LIMIT = 2**26
"""Maximum size of one node's affine form, in numbers (`OwnOptions.form_limit`)."""
