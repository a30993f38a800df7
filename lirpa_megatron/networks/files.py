"""Input files as bytes, plain or gzip-compressed, with one clear error for each way to fail."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from pathlib import Path

from lirpa_megatron.errors import UserError

_GZIP_MAGIC = b"\x1f\x8b"
# Of what a compressed file holds; protobuf's own limit is 2 GiB.
_MOST_BYTES = 2**31


def find_file(path: str | Path, what: str) -> Path:
    """Path of an existing regular file; a missing `NAME` is looked for as `NAME.gz`.

    Args:
        path: the file as the user wrote it.
        what: what it is, for the error ("network", "property", ...).

    Raises:
        UserError: neither exists, it is not a regular file, or the system refuses to say.
    """
    path = Path(path)
    # ".", ".." and "/" have no name to append to.
    candidates = [path, *([path.with_name(path.name + ".gz")] if path.name else [])]
    try:
        for candidate in candidates:
            if candidate.is_file():
                return candidate
            if candidate.exists():
                raise UserError(f"{what} {path} is not a regular file")
    except OSError as error:  # a folder without permission, a name that is too long
        reason = error.strerror or error
        raise UserError(f"{what} {str(path)[:200]} cannot be read: {reason}") from None
    raise UserError(f"{what} file {path} does not exist")


def read_file(path: str | Path, what: str) -> bytes:
    """Content of a file, decompressed if it begins with gzip's magic number.

    Raises:
        UserError: missing, unreadable, or damaged compression.
    """
    path = find_file(path, what)
    try:
        data = path.read_bytes()
        return _decompressed(data, f"{what} {path}") if data.startswith(_GZIP_MAGIC) else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{what} {path} is truncated or corrupt: {error}") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None


def _decompressed(data: bytes, what: str) -> bytes:
    """Raises UserError for content that only a hostile file has so much of."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise UserError(f"{what} holds more than {_MOST_BYTES >> 30} GiB: decompress it first")
    return content


def stem(path: str | Path) -> str:
    """File name without its folder, `.gz`, and the extension before it."""
    name = Path(path).name
    return Path(name.removesuffix(".gz")).stem


def read_text(path: str | Path, what: str) -> str:
    """Content of a text file: UTF-8, with a byte order mark or without, or UTF-16 with one.

    Raises:
        UserError: as `read_file`, or it is not text.
    """
    data = read_file(path, what)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not a text file") from None
