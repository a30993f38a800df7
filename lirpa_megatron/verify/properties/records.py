"""Records of proved properties (`--record`), and their check (`lirpa-megatron check`).

A record is a JSON file:

    format, version     "lirpa_megatron record", 4 (3 had no points, 2 no `cuts`)
    network, property   name, file, and a SHA-256: of structure and weights, of the text; of a
                        network also `named`: the files by their names in a query of VNN-LIB 2.0
    tensor_parallel     ranks that found it
    neurons             how many neurons there are that can be split
    trees               for each box and disjunct of the property: its leaves, each with its splits
                        [neuron, sign, point] from the root on, and its bound; at ReLUs the point is
                        0, elsewhere a number that float32 has
    cuts                for boxes that were cut themselves, in the place of their open disjuncts'
                        trees: the parts, each in front of those that it was cut into, the lower one
                        first: [input, where, disjuncts that are refuted in all of it], or, of one
                        that was not cut, [disjuncts, bound]
                        Of networks whose neurons cannot be split also of boxes that were not cut
    inner               bounds of inner neurons that the trees rest on, `sign * z >= bound` in a
                        box: box, neuron, sign, bound, and the splits of the leaves

Inputs are those behind the normalisation at the network's input. Neurons are numbered from the last
operator to the first, all features of all ranks, so that a record does not depend on how the
network was sharded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.complete.box_replay import unproved_parts
from lirpa_megatron.complete.cut_tree import Cut, CutTree, Piece
from lirpa_megatron.complete.problem import SearchOptions
from lirpa_megatron.complete.replay import ClaimedBound, unproved_leaves
from lirpa_megatron.complete.roots import neuron_count
from lirpa_megatron.complete.tree import Node, tree_of
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.properties import complete
from lirpa_megatron.verify.properties.attack import Target
from lirpa_megatron.verify.properties.hashes import network_hash
from lirpa_megatron.verify.properties.instance import Outcome, most_boxes
from lirpa_megatron.verify.properties.instance_list import Instance
from lirpa_megatron.verify.properties.loading import Loaded, load_sources
from lirpa_megatron.verify.properties.property import Property, Region
from lirpa_megatron.verify.properties.record_files import FORMAT, VERSION, read_record, text_hash
from lirpa_megatron.verify.properties.sources import check_sources, files_of, read_sources
from lirpa_megatron.verify.properties.specification import region_rows
from lirpa_megatron.verify.properties.vnnlib import read_vnnlib

_EFFORT = SearchOptions(iterations=40, first_iterations=60)


def record_of(
    loaded: Loaded, prop: Property, instance: Instance, outcome: Outcome
) -> dict[str, Any]:
    """The record of a proved property, as plain data; every rank calls it.

    Args:
        loaded, prop, instance: what was verified.
        outcome: "unsat", with the trees of branch and bound, if it was needed, kept.
    """
    split: dict[tuple[int, int], list[Any]] = {}
    for region, disjunct, leaf in [] if outcome.decided is None else outcome.decided.leaves:
        own = split.setdefault((region, disjunct), [])
        own.append({"splits": [list(s) for s in leaf.splits], "bound": leaf.margin})
    trees, cuts, were_cut = [], [], set()
    for tree in [] if outcome.decided is None else outcome.decided.cuts:
        cuts.append({"box": tree.box, "nodes": [_plain(node) for node in tree.nodes]})
        were_cut |= {(tree.box, d) for node in tree.nodes for d in node.proved}
    branching = None if outcome.decided is None else outcome.decided.branching
    # what was proved without a split is one leaf; where neurons cannot be split one part
    for i, region in enumerate(prop.regions):
        left = [d for d in range(len(region.disjuncts)) if (i, d) not in were_cut]
        has_trees = prop.vacuous is not None or _has_trees(loaded, prop, region, branching)
        if left and not has_trees:
            _hold_in_all(cuts, i, left)
            continue
        for d in left:
            leaves = split.get((i, d), [{"splits": [], "bound": None}])
            trees.append({"box": i, "disjunct": d, "leaves": leaves})
    claims = [] if outcome.decided is None else outcome.decided.claims
    inner = [
        {"box": c.box, "neuron": c.number, "sign": c.sign, "bound": c.bound,
         "leaves": [[list(s) for s in leaf] for leaf in c.leaves]}
        for c in claims
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "network": {
            "name": instance.network, "file": str(instance.network_path.resolve()),
            "checkpoint": instance.is_checkpoint, "sha256": network_hash(loaded),
            "named": [[name, str(path.resolve())] for name, path in instance.named],
        },
        "property": {
            "name": instance.property, "file": str(instance.property_path.resolve()),
            "sha256": text_hash(instance.property_path),
        },
        "tensor_parallel": loaded.ranks.size,
        "neurons": neuron_count(loaded.bounded),
        "trees": trees,
        "cuts": cuts,
        "inner": inner,
    }


def _has_trees(
    loaded: Loaded, prop: Property, region: Region, branching: str | None
) -> bool:
    """Whether `check` is to bound the leaves of a tree of splits, even if it is one leaf."""
    bounded = loaded.bounded_for([prop.rows[row] for row in region_rows(region)])
    if loaded.ranks.stages > 1:  # which `check` does not need
        return True
    if neuron_count(bounded) == 0:
        return False
    if complete.why_not(loaded, bounded, [(region, ())], "relu") is None:
        return True
    if branching is None and complete.why_not(loaded, bounded, [(region, ())], "auto") is None:
        branching = complete.choice(loaded, bounded, [(region, ())])
    return branching == "nonlinear"


def _hold_in_all(cuts: list[dict[str, Any]], box: int, disjuncts: list[int]) -> None:
    """Enters disjuncts that are refuted in all of a box at the root of its tree."""
    for tree in cuts:
        if tree["box"] == box:
            root = tree["nodes"][0]
            root[2 if len(root) == 3 else 0] += disjuncts
            return
    cuts.append({"box": box, "nodes": [[disjuncts, None]]})


def _plain(node: Cut | Piece) -> list[Any]:
    if isinstance(node, Cut):
        return [node.input, node.at, list(node.proved)]
    return [list(node.proved), node.bound]


def check_record(
    path: Path, network: Path | None = None, is_checkpoint: bool = False,
    prop: Path | None = None, onnx_output: str | None = None,
) -> str:
    """Proves a record's property again, in float64, leaf by leaf.

    Args:
        path: the record.
        network: its network's file or checkpoint; None: where the record says.
        is_checkpoint: whether that is a checkpoint.
        prop: the property's file; None: where the record says.
        onnx_output: as for `load`.

    Returns:
        what was proved, in one line.

    Raises:
        UserError: the record is of another network or property, its leaves do not cover the boxes,
            or one of them is not proved.
    """
    record = read_record(path)
    net, text = record["network"], record["property"]
    named = tuple((name, Path(file)) for name, file in net.get("named", ()))
    if network is None:
        network, is_checkpoint = Path(net["file"]), bool(net["checkpoint"])
    else:
        if len({file for _, file in named}) > 1:
            raise UserError(f"record {path} is of two networks, which are looked for where it "
                            "says: leave out --onnx and --load")
        named = tuple((name, network) for name, _ in named)
    prop = Path(text["file"]) if prop is None else prop
    files = [(file, "--onnx or --load") for file in (network, *(file for _, file in named))]
    for file, option in (*files, (prop, "--vnnlib")):
        if not file.exists():
            raise UserError(f"record {path}: {file} does not exist; say where it is with {option}")
    if text_hash(prop) != text["sha256"]:
        raise UserError(f"record {path} is of another property than {prop}: the files differ")
    read = read_vnnlib(prop)
    sources = read_sources(
        files_of(read, prop, network, named), is_checkpoint, onnx_output, read
    )
    check_sources(read, prop, sources)
    loaded = load_sources(sources, read.wiring, "float64", {})
    if network_hash(loaded) != net["sha256"]:
        raise UserError(f"record {path} is of another network than {network}: weights or structure "
                        "differ")
    leaves = _check_trees(path, record, loaded, read)
    parts = sum(len(node) == 2 for tree in record["cuts"] for node in tree["nodes"])
    inner = f" and bounds of {len(record['inner'])} inner neurons" if record["inner"] else ""
    return (
        f"record {path} holds: {text['name']} of {net['name']}, {leaves} leaves of "
        f"{len(record['trees'])} trees{inner}{_many(parts)} bounded in float64"
    )


def _many(parts: int) -> str:
    return f" and {parts} parts of boxes" if parts else ""


def _check_trees(path: Path, record: dict[str, Any], loaded: Loaded, prop: Property) -> int:
    """Checks what the trees cover, and bounds their leaves; returns how many."""
    wanted = [(i, d) for i, r in enumerate(prop.regions) for d in range(len(r.disjuncts))]
    known = {(tree["box"], tree["disjunct"]): tree["leaves"] for tree in record["trees"]}
    others = [f"a tree for box {i}, disjunct {d}" for i, d in known if (i, d) not in wanted]
    others += [f"a bound of neuron {claim['neuron']} in box {claim['box']}"
               for claim in record["inner"] if not 0 <= claim["box"] < len(prop.regions)]
    if others:
        raise UserError(f"record {path} has {others[0]}, which the property lacks")
    if len(known) < len(record["trees"]):
        raise UserError(f"record {path} has two trees for one box and disjunct")
    were_cut = _check_cuts(path, record, loaded, prop)
    both = [place for place in were_cut if place in known]
    if both:
        raise UserError(f"record {path} has two trees for one box and disjunct")
    missing = [place for place in wanted if place not in known and place not in were_cut]
    if missing and prop.vacuous is None:
        raise UserError(f"record {path} has no tree for box {missing[0][0]}, disjunct "
                        f"{missing[0][1]} of the property")
    if prop.vacuous is not None:
        return 0
    count = 0
    # Those that branch and bound was about are bounded together again: inner bounds that
    # alpha-CROWN optimizes for others could be looser.
    for was_searched in (True, False):
        own = {
            i: tuple(d for d in range(len(r.disjuncts))
                     if (i, d) in known and _was_searched(known[i, d]) == was_searched)
            for i, r in enumerate(prop.regions)
        }
        places = [i for i, disjuncts in own.items() if disjuncts]
        targets = [(prop.regions[i], own[i]) for i in places]
        for bounded, positions in complete.one_module(loaded, prop, targets, most_boxes(loaded)):
            some = [targets[k] for k in positions]
            count += _check_group(
                path, record, loaded, bounded, prop, some, [places[k] for k in positions], known,
                was_searched,
            )
    return count


def _was_searched(leaves: list[Any]) -> bool:
    return any(leaf["bound"] is not None for leaf in leaves)


def _check_group(
    path: Path, record: dict[str, Any], loaded: Loaded, bounded: BoundedModule, prop: Property,
    targets: list[Target], boxes: list[int], known: dict[tuple[int, int], Any], with_inner: bool,
) -> int:
    """Checks targets of one module, whose boxes have these positions; returns how many leaves."""
    why = complete.why_not(loaded, bounded, targets, "nonlinear")
    if why is not None:
        raise UserError(f"record {path}: {why}")
    goals = complete.goals_of(loaded, bounded, prop, targets)
    total, trees, count = neuron_count(bounded), [], 0
    for k, d in goals.of:
        own = known[boxes[k], d]
        where = f"box {boxes[k]}, disjunct {d}"
        trees.append(_tree(path, where, [leaf["splits"] for leaf in own], total))
        count += len(own)
    claims = []
    for claim in record["inner"] if with_inner else ():
        if claim["box"] in boxes:
            where = f"box {claim['box']}, neuron {claim['neuron']}"
            if not 0 <= claim["neuron"] < total:
                raise UserError(f"record {path}, {where}: the network has {total} neurons")
            tree = _tree(path, where, claim["leaves"], total)
            box = boxes.index(claim["box"])
            claims.append(
                ClaimedBound(box, claim["neuron"], claim["sign"], claim["bound"], tree)
            )
    try:
        unproved = unproved_leaves(bounded, goals.problem, trees, _EFFORT, claims)
    except ValueError as error:
        raise UserError(f"record {path}: {error}") from None
    for goal, leaf, margin in unproved:
        if isinstance(goal, ClaimedBound):
            where = f"box {boxes[goal.box]}, neuron {goal.number}"
            margin += goal.bound
        else:
            k, d = goals.of[goal]
            where = f"box {boxes[k]}, disjunct {d}"
        raise UserError(f"record {path}, {where}: leaf {leaf} is not proved, its bound is "
                        f"{margin:.3g}")
    return count


def _check_cuts(
    path: Path, record: dict[str, Any], loaded: Loaded, prop: Property
) -> set[tuple[int, int]]:
    """Bounds the parts of boxes that were cut; returns these boxes' disjuncts."""
    trees = {tree["box"]: tree["nodes"] for tree in record["cuts"]}
    if len(trees) < len(record["cuts"]):
        raise UserError(f"record {path} has two trees of cuts for one box")
    targets, boxes, found = [], [], set()
    for i, nodes in sorted(trees.items()):
        own = {d for node in nodes for d in node[2 if len(node) == 3 else 0]}
        if not 0 <= i < len(prop.regions) or not own <= set(range(len(prop.regions[i].disjuncts))):
            raise UserError(f"record {path} has a tree of cuts for box {i}, disjuncts "
                            f"{sorted(own)}, which the property lacks")
        if own:
            boxes.append(i)
            targets.append((prop.regions[i], tuple(sorted(own))))
            found |= {(i, d) for d in own}
    for bounded, positions in complete.one_module(loaded, prop, targets, most_boxes(loaded)):
        some = [targets[k] for k in positions]
        why = complete.why_not(loaded, bounded, some, "input")
        if why is not None:
            raise UserError(f"record {path}: {why}")
        goals = complete.goals_of(loaded, bounded, prop, some)
        goal_of = {place: goal for goal, place in enumerate(goals.of)}
        cut = []
        for k, position in enumerate(positions):
            nodes = trees[boxes[position]]
            cut.append(CutTree(k, tuple(_node(node, k, goal_of) for node in nodes)))
        for tree in cut:
            where = f"box {boxes[positions[tree.box]]}"
            try:
                for goal, node, margin in unproved_parts(bounded, goals.problem, [tree]):
                    raise UserError(
                        f"record {path}, {where}, disjunct {goals.of[goal][1]}: the part of node "
                        f"{node} is not proved, its bound is {margin:.3g}"
                    )
            except ValueError as error:
                raise UserError(f"record {path}, {where}: {error}") from None
    return found


def _node(node: list[Any], target: int, goal_of: dict[tuple[int, int], int]) -> Cut | Piece:
    *place, last = node if len(node) == 3 else (node[1], node[0])
    proved = tuple(goal_of[target, d] for d in last)
    return Cut(*place, proved) if len(node) == 3 else Piece(proved, place[0])


def _tree(path: Path, where: str, leaves: list[Any], neurons: int) -> Node:
    try:
        return tree_of([[tuple(split) for split in leaf] for leaf in leaves], neurons)
    except ValueError as error:
        raise UserError(f"record {path}, {where}: {error}") from None
