"""What differs between the releases of megatron-core that are supported, for tests."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from packaging.version import Version

Model = TypeVar("Model")

RELEASE = Version(importlib.metadata.version("megatron-core"))
WRITES_COMMON_ITEM = Version("0.19") <= RELEASE
"""dist_checkpointing.save puts what is no tensor into an item, and writes no `common.pt`."""
SPLITS_QUERY_GROUPS = Version("0.16") <= RELEASE
"""Fewer query groups than tensor-parallel ranks are accepted."""


def needs_query_groups(groups: int, ranks: int) -> None:
    """Skips a test of a model of so many query groups if the release refuses to split them."""
    if groups < ranks and not SPLITS_QUERY_GROUPS:
        pytest.skip("this release of megatron-core refuses fewer query groups than ranks")


def config_has(*fields: str) -> bool:
    """Whether TransformerConfig has all of these fields."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return set(fields) <= TransformerConfig.__dataclass_fields__.keys()


def built(build: Callable[..., Model], *args: Any, **kwargs: Any) -> Model | None:
    """`build(...)`; None if it is of fewer query groups than ranks and the release refuses these.
    """
    try:
        return build(*args, **kwargs)
    except ValueError as error:
        if SPLITS_QUERY_GROUPS or "num_query_groups" not in str(error):
            raise
        return None
