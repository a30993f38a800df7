"""Files of searches that were ended (`OUTPUT.search`), from which `--resume` goes on.

A file is JSON:

    format, version     "lirpa_megatron search", 1
    network, property   name, file, and a SHA-256 as in a record
    dtype               that bounds were computed in
    trees               of boxes and disjuncts whose neurons were split: nodes as in
                        `complete.state`
    cuts                of boxes that were cut: the same
    inner               bounds of inner neurons: box, neuron, sign, bound, nodes
    rounds, refined, domains, inner_domains    how far the search had come

Nothing in it is believed (`complete.state`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lirpa_megatron.complete.roots import neuron_count
from lirpa_megatron.complete.state import InnerBound, SearchState, StateError, split_leaves
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.properties.hashes import network_hash
from lirpa_megatron.verify.properties.instance_list import Instance
from lirpa_megatron.verify.properties.loading import Loaded
from lirpa_megatron.verify.properties.property import Property
from lirpa_megatron.verify.properties.record_files import (
    read_versioned,
    text_hash,
    write_record,
)

_FORMAT, _VERSION = "lirpa_megatron search", 1
_MOST_ROUNDS = 20
_COUNTS = "rounds", "domains", "inner_domains"


class SearchFileError(UserError):
    """A file of a search that cannot be used."""


def search_files(path: Path) -> list[Path]:
    """The file, and those of replicas that worked alone."""
    found = [path, *sorted(path.parent.glob(f"{path.name}.*"))]
    return [p for p in found if p.suffix == ".search" or p.suffix[1:].isdecimal() if p.is_file()]


def read_search(path: Path) -> dict[str, Any]:
    """What a file says, each field of its kind.

    Raises:
        SearchFileError: it is not such a file.
    """
    try:
        found = read_versioned(
            path, "search", _FORMAT, (_VERSION,),
            "the file of a search that was ended: move it away",
        )
    except UserError as error:
        raise SearchFileError(str(error)) from None
    try:
        for part in ("network", "property"):
            if not all(type(found[part][k]) is str for k in ("name", "file", "sha256")):
                raise TypeError
        if type(found["dtype"]) is not str or type(found["refined"]) is not bool \
                or not all(type(found[k]) is int and found[k] >= 0 for k in _COUNTS) \
                or found["rounds"] > _MOST_ROUNDS:
            raise TypeError
        keys = {"trees": ("box", "disjunct"), "cuts": ("box",), "inner": ("box", "neuron", "sign")}
        for kind, names in keys.items():
            seen = [tuple(tree[name] for name in names) for tree in found[kind]]
            if len(set(seen)) < len(seen) or not all(type(n) is int for key in seen for n in key) \
                    or not all(type(tree["nodes"]) is list for tree in found[kind]):
                raise TypeError
        for tree in found["inner"]:
            if tree["sign"] not in (1, -1) or type(tree["bound"]) is not float \
                    or not math.isfinite(tree["bound"]):
                raise TypeError
    except (KeyError, TypeError):
        raise SearchFileError(f"search {path} is damaged: a field is missing or of a wrong kind") \
            from None
    return found


def is_of(found: dict[str, Any], instance: Instance) -> bool:
    """Whether a search is an instance's, by what its files are called."""
    return (found["network"]["file"], found["property"]["file"]) == _files(instance)


def state_of(
    path: Path, found: dict[str, Any], instance: Instance, loaded: Loaded, prop: Property
) -> SearchState:
    """The state in a file of an instance's search; every rank calls it.

    Raises:
        SearchFileError: it is of another network, property or dtype, or its trees are none.
    """
    if found["property"]["sha256"] != text_hash(instance.property_path):
        raise SearchFileError(f"search {path} is of another property: the files differ; remove it "
                              "to begin anew")
    if found["network"]["sha256"] != network_hash(loaded):
        raise SearchFileError(f"search {path} is of another network: weights or structure differ; "
                              "remove it to begin anew")
    if found["dtype"] != loaded.dtype:
        raise SearchFileError(f"search {path} has computed in {found['dtype']}: give --dtype "
                              f"{found['dtype']}, or remove it to begin anew")
    total, regions = neuron_count(loaded.bounded), prop.regions
    try:
        for tree in (tree for kind in ("trees", "cuts", "inner") for tree in found[kind]):
            if not 0 <= tree["box"] < len(regions):
                raise StateError(f"box {tree['box']} does not exist")
        for tree in found["trees"]:
            if not 0 <= tree["disjunct"] < len(regions[tree["box"]].disjuncts):
                raise StateError(f"disjunct {tree['disjunct']} of box {tree['box']} does not exist")
        for tree in (*found["trees"], *found["inner"]):
            split_leaves(tree["nodes"], total)
    except StateError as error:
        raise SearchFileError(f"search {path} is damaged: {error}") from None
    return SearchState(
        {(tree["box"], tree["disjunct"]): tuple(tree["nodes"]) for tree in found["trees"]},
        {tree["box"]: tuple(tree["nodes"]) for tree in found["cuts"]},
        tuple(InnerBound(*(tree[k] for k in ("box", "neuron", "sign", "bound")), tree["nodes"])
              for tree in found["inner"]),
        refined=found["refined"], **{k: found[k] for k in _COUNTS},
    )


def write_search(
    path: Path, state: SearchState, instance: Instance, loaded: Loaded, is_first: bool
) -> None:
    """Writes a state at once, if this rank is the first; every rank calls it."""
    sha256 = network_hash(loaded)
    if not is_first:
        return
    network, prop = _files(instance)
    write_record(path, {
        "format": _FORMAT,
        "version": _VERSION,
        "network": {"name": instance.network, "file": network, "sha256": sha256},
        "property": {"name": instance.property, "file": prop,
                     "sha256": text_hash(instance.property_path)},
        "dtype": loaded.dtype,
        "refined": state.refined,
        **{k: getattr(state, k) for k in _COUNTS},
        "trees": [{"box": box, "disjunct": d, "nodes": nodes}
                  for (box, d), nodes in state.trees.items()],
        "cuts": [{"box": box, "nodes": nodes} for box, nodes in state.cuts.items()],
        "inner": [{"box": c.box, "neuron": c.number, "sign": c.sign, "bound": c.bound,
                   "nodes": c.tree} for c in state.inner],
    })


def _files(instance: Instance) -> tuple[str, str]:
    network, prop = instance.files
    return network or "", prop or ""
