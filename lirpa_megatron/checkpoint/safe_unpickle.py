"""Files of torch.save that may come from a stranger, read without running what they say.

torch.load with weights_only=True builds tensors and plain containers and refuses every other name
before it is imported. Megatron's files need a few names more: the Namespace of its arguments, the
enums in it, and the state of the random number generators. Each of these is given a stub, a class
that keeps plain data and does nothing; what it stands for is never imported. Any other name is
refused, and the message says which.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from lirpa_megatron.errors import UserError

_INERT = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace"
    r"|signal\.(Signals|SIG\w+)"
    r"|megatron\.core\.enums\.\w+"
    r"|megatron\.core\.transformer\.enums\.\w+"
    r"|megatron\.core\.optimizer\.optimizer_config\.\w*OptimizerConfig"
    r"|megatron\.core\.rerun_state_machine\.\w+"
    r"|megatron\.core\.transformer\.pipeline_parallel_layer_layout\.\w+"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+)"
    r"|io\.BytesIO|_io\.BytesIO"
    r"|pathlib\.(Pure)?(Posix|Windows)Path"
)
"""Names that Megatron writes and that need not mean anything here."""


class Inert:
    """Stands for an object of a class that is not imported: keeps its state, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__}>"


def read_inert(source: Path | IO[bytes], what: str, mmap: bool = False) -> Any:
    """What a file of torch.save holds; tensors are on the CPU.

    Args:
        source: a path, or an open binary stream (seekable).
        what: the file's name in messages.
        mmap: of a path only: tensors stay on the disk until they are used.

    Raises:
        UserError: missing, damaged, or naming anything that is not plain data (the name is given;
            nothing of the file has run).
    """
    try:
        return _load(source, what, mmap)
    except FileNotFoundError:
        raise UserError(f"checkpoint file {what} does not exist") from None
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise _refusal(what, refused[1]) from None
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"checkpoint file {what} is corrupt ({reason[:300]})") from None


def _load(source: Path | IO[bytes], what: str, mmap: bool) -> Any:
    options = {"map_location": "cpu", "weights_only": True} | ({"mmap": True} if mmap else {})
    # The function came with torch 2.6; without it only files without any such name are read.
    find = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if find is None:
        return torch.load(source, **options)
    with nothing_else_allowed():
        names = find(source)
        if not isinstance(source, Path):
            source.seek(0)
        for name in names:
            if not _INERT.fullmatch(name):
                raise _refusal(what, name)
        torch.serialization.add_safe_globals([_stub(name) for name in names])
        return torch.load(source, **options)


@contextlib.contextmanager
def nothing_else_allowed() -> Iterator[None]:
    """Takes back, for a while, what others (Megatron too) have allowed torch.load to call."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _stub(full_name: str) -> type:
    """A class that torch takes for the named one."""
    module, _, name = full_name.rpartition(".")
    return type(name, (Inert,), {"__module__": module, "__qualname__": name})


def _refusal(what: str, name: str) -> UserError:
    return UserError(
        f"checkpoint file {what} is refused: its pickle names {name}, which could run code"
    )
