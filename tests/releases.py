"""What differs between the releases of megatron-core that are supported, for tests."""

import importlib.metadata

from packaging.version import Version

RELEASE = Version(importlib.metadata.version("megatron-core"))
WRITES_COMMON_ITEM = Version("0.19") <= RELEASE
"""dist_checkpointing.save puts what is no tensor into an item, and writes no `common.pt`."""
SPLITS_QUERY_GROUPS = Version("0.16") <= RELEASE
"""Fewer query groups than tensor-parallel ranks are accepted."""
