"""The directory of a checkpoint, as Megatron-LM lays it out.

    OUT/latest_checkpointed_iteration.txt     "release", or an iteration number
    OUT/latest_train_state.pt                 Megatron-Bridge's, if the former is not there
    OUT/release/                              or iter_0000010/
        metadata.json  .metadata  __0_0.distcp ...  common.pt

NeMo 2.0 has no tracker: its checkpoints are CKPT/weights/ and CKPT/context/.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lirpa_megatron.checkpoint.safe_unpickle import read_inert
from lirpa_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
COMMON = "common.pt"
WEIGHTS = "weights"
TRAIN_STATE = "latest_train_state.pt"


def split_iteration(path: Path) -> tuple[Path, Path | None]:
    """A checkpoint, and the directory of an iteration of it if the path names one.

    `OUT/iter_0000010`, `OUT/release` and a rank's folder in them, `.../mp_rank_00`, name one,
    unless they have a tracker of their own.
    """
    inner = path.resolve() if path.name in ("", "..") else path
    if re.fullmatch(r"mp_rank_\d+(_\d+)*", inner.name):
        inner = inner.parent
    if re.fullmatch(rf"{RELEASE}|iter_\d{{1,12}}", inner.name) and not (inner / TRACKER).exists():
        return inner.parent, inner
    return path, None


def data_directory(checkpoint: Path, iteration: int | str | None = None) -> Path:
    """The directory of an iteration of a checkpoint.

    Args:
        checkpoint: the directory with the tracker file, or that of an iteration in it.
        iteration: its number, or "release"; None: the directory given, or what the tracker names.

    Raises:
        UserError: no such checkpoint or iteration, no tracker, or a tracker that names nothing.
    """
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint} is not a directory")
    checkpoint, named = split_iteration(checkpoint)
    if named is not None:
        wanted = None if iteration is None else _directory_of(checkpoint, str(iteration)).name
        if wanted not in (None, named.name):
            raise UserError(
                f"{named} is not iteration {iteration}: give {checkpoint}, or no iteration"
            )
        return named
    if (checkpoint / WEIGHTS).is_dir() and not (checkpoint / TRACKER).exists():
        if iteration is not None:
            raise UserError(f"NeMo checkpoint {checkpoint} has no iterations: give none")
        return checkpoint / WEIGHTS
    if iteration is not None:
        return _chosen_directory(checkpoint, iteration)
    tracker = checkpoint / TRACKER
    try:
        if not tracker.exists() and (checkpoint / TRAIN_STATE).is_file():
            tracker = checkpoint / TRAIN_STATE
            word = _step_of(tracker)
        else:
            word = tracker.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise UserError(
            f"{checkpoint} is not a Megatron checkpoint: it has no {TRACKER}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tracker {tracker} cannot be read: {error}") from None
    if not re.fullmatch(rf"{RELEASE}|\d{{1,12}}", word):
        raise UserError(f"tracker {tracker} holds {word[:40]!r}, not an iteration or 'release'")
    directory = _directory_of(checkpoint, word)
    if not directory.is_dir():
        raise UserError(f"tracker {tracker} names {word!r}, but there is no {directory}")
    return directory


def _step_of(path: Path) -> str:
    """The step in a train state of Megatron-Bridge."""
    state = read_inert(path, str(path))
    step = state.get("step") if isinstance(state, dict) else None
    if not isinstance(step, torch.Tensor) or step.numel() != 1 or step.is_floating_point():
        raise UserError(f"tracker {path} holds no step")
    return str(int(step))


def _chosen_directory(checkpoint: Path, iteration: int | str) -> Path:
    word = str(iteration)
    if not re.fullmatch(rf"{RELEASE}|\d{{1,12}}", word):
        raise UserError(f"iteration {word[:40]!r} is neither a number nor 'release'")
    directory = _directory_of(checkpoint, word)
    if not directory.is_dir():
        found = sorted(p.name for p in checkpoint.iterdir() if re.match("iter_|release", p.name))
        raise UserError(
            f"checkpoint {checkpoint} has no iteration {word}; it has "
            f"{', '.join(found[:20]) or 'none'}"
        )
    return directory


def _directory_of(checkpoint: Path, word: str) -> Path:
    return checkpoint / (RELEASE if word == RELEASE else f"iter_{int(word):07d}")
