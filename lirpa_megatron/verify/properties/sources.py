"""The files of the networks that a property is about, and whether they are what it declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lirpa_megatron.checkpoint.reader import read_description
from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.description import NetworkDescription
from lirpa_megatron.networks.onnx_import import ImportedNetwork, Port, read_onnx
from lirpa_megatron.verify.properties.property import Declared, Property, Tensor
from lirpa_megatron.verify.properties.vnnlib import check_sizes

Named = tuple[tuple[str, Path], ...]
"""Files by the names that a query of VNN-LIB 2.0 has for its networks."""


@dataclass(frozen=True)
class Source:
    """A network's file."""

    path: Path
    description: NetworkDescription
    # content of an ONNX file; None: the weights are in a checkpoint
    imported: ImportedNetwork | None

    def without_weights(self) -> Source:
        if self.imported is None:
            return self
        return replace(self, imported=replace(self.imported, weights={}))


def read_source(
    path: Path, is_checkpoint: bool, output: str | None = None, whole: bool = False
) -> Source:
    """Reads a file.

    Args:
        path: NET.onnx[.gz], or a checkpoint's directory.
        is_checkpoint: which of the two.
        output, whole: of an ONNX file, as for `read_onnx`.
    """
    if is_checkpoint:
        return Source(path, read_description(path), None)
    imported = read_onnx(path, output, whole)
    return Source(path, imported.description, imported)


def read_sources(
    paths: Sequence[Path], is_checkpoint: bool, output: str | None, prop: Property
) -> list[Source]:
    """The networks of a property; a file that is there twice is one object.

    Args:
        paths: as `files_of` says.
        is_checkpoint, output: as for `read_source`.
        prop: VNN-LIB 2.0 wants all inputs and outputs of a file declared.
    """
    whole = bool(prop.networks)
    read = {path: read_source(path, is_checkpoint, output, whole) for path in dict.fromkeys(paths)}
    return [read[path] for path in paths]


def files_of(prop: Property, path: Path, network: Path, named: Named) -> tuple[Path, ...]:
    """The file of each network that a property declares; of one, where it declares none.

    Args:
        prop: the property.
        path: its file, for errors.
        network: the network's file, if none is named.
        named: files by name.

    Raises:
        UserError: a name that the property lacks, a network without a file or with two.
    """
    where = f"property {path}"
    declared = prop.networks
    if not declared:
        if len(named) > 1:
            raise UserError(f"{where} is of one network (VNN-LIB 1.0), but {len(named)} are given")
        return (network,)
    names = ", ".join(d.name for d in declared)
    if not named:
        if sum(d.equal_to is None for d in declared) > 1:
            raise UserError(
                f"{where} is of several networks ({names}): say which file is which, with "
                "--network NAME=FILE for each, or as pairs in instances.csv"
            )
        return (network,) * len(declared)
    files = dict(named)
    for name, _ in named:
        if name not in {d.name for d in declared}:
            raise UserError(f"{where} has no network {name!r}; its networks are {names}")
    found: dict[str, Path] = {}
    for d in declared:
        file = files.get(d.name)
        if d.equal_to is not None:
            same = found[d.equal_to]
            if file is not None and file.resolve() != same.resolve():
                raise UserError(f"{where} says that network {d.name} is equal to {d.equal_to}, but "
                                f"their files are {file} and {same}: leave out the first")
            file = same
        if file is None:
            raise UserError(f"{where} has a network {d.name}, and no file is given for it "
                            f"(--network {d.name}=FILE)")
        found[d.name] = file
    return tuple(found[d.name] for d in declared)


def check_sources(prop: Property, path: Path, sources: Sequence[Source]) -> None:
    """Raises UserError unless a property's networks are those of the files.

    Args:
        prop: the property.
        path: its file, for errors.
        sources: of each of its networks.
    """
    for k, source in enumerate(sources):
        description = source.description
        name = f"network {description.name}"
        if prop.networks:
            _check_tensors(prop.networks[k], source, f"property {path}", name)
        check_sizes(prop, path, k, description.n_in, description.n_out, name)


def _check_tensors(declared: Declared, source: Source, where: str, name: str) -> None:
    """That tensors agree in number, size and type; of a checkpoint, their types."""
    description, imported = source.description, source.imported
    read = description.input_dtype or description.dtype
    made = description.layers[-1].dtype
    for what, tensors, ports, dtype in (
        ("input", declared.inputs, imported and imported.inputs, read),
        ("output", declared.outputs, imported and imported.outputs, made),
    ):
        if ports:
            if [t.size for t in tensors] != [p.size for p in ports]:
                raise UserError(f"{where} declares {what}s {_shown(tensors)}, but {name} has "
                                f"{_shown(ports)} (elements of each, in order)")
        types = [port.dtype for port in ports] if ports else [dtype] * len(tensors)
        for tensor, kind in zip(tensors, types, strict=True):
            if tensor.dtype not in ("real", kind):
                raise UserError(
                    f"{where} declares {tensor.name} as {tensor.dtype}, but that {what} of {name} "
                    f"is {kind}: write {kind}, or real"
                )


def _shown(tensors: Sequence[Tensor] | Sequence[Port]) -> str:
    return ", ".join(f"{t.name} ({t.size})" for t in tensors)
