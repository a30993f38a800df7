"""The directory of a checkpoint, as Megatron-LM lays it out.

    OUT/latest_checkpointed_iteration.txt     "release", or an iteration number
    OUT/release/                              or iter_0000010/
        metadata.json  .metadata  __0_0.distcp ...  common.pt
"""

from __future__ import annotations

import re
from pathlib import Path

from lirpa_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
COMMON = "common.pt"


def data_directory(checkpoint: Path) -> Path:
    """The directory that the checkpoint's tracker names.

    Raises:
        UserError: no such checkpoint, no tracker, or a tracker that names nothing.
    """
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint} is not a directory")
    tracker = checkpoint / TRACKER
    try:
        word = tracker.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise UserError(
            f"{checkpoint} is not a Megatron checkpoint: it has no {TRACKER}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tracker {tracker} cannot be read: {error}") from None
    if not re.fullmatch(rf"{RELEASE}|\d{{1,12}}", word):
        raise UserError(f"tracker {tracker} holds {word[:40]!r}, not an iteration or 'release'")
    directory = checkpoint / (RELEASE if word == RELEASE else f"iter_{int(word):07d}")
    if not directory.is_dir():
        raise UserError(f"tracker {tracker} names {word!r}, but there is no {directory}")
    return directory
