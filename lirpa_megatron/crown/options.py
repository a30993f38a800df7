"""Options and arguments: this package's own, and which of auto_LiRPA's are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.limits import FORM_LIMIT

METHODS = ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized")
"""Methods of `compute_bounds`, from the cheapest on; auto_LiRPA's other spellings of them are
accepted too, and 'auto' (`cheaper_first`)."""

_SPELLINGS = {
    "ibp": "IBP",
    "crown-ibp": "CROWN-IBP",
    "ibp+crown": "CROWN-IBP",
    "ibp+backward": "CROWN-IBP",
    "crown": "CROWN",
    "backward": "CROWN",
    "crown-optimized": "CROWN-Optimized",
    "alpha-crown": "CROWN-Optimized",
    "auto": "auto",
}


@dataclass(frozen=True)
class OwnOptions:
    """Entries of `bound_opts` that auto_LiRPA does not have."""

    max_spec_rows: int | None = None
    """Most rows of A that a rank carries at once. None: as many as `pass_memory` has room for. The
    same on every rank."""
    pass_memory: float | None = None
    """MiB for the rows of A (both sides, at the node where they take most) that a rank carries at
    once; a pass needs a small multiple of it. None: 16 MiB on a CPU (what its cache holds), shared
    by the ranks; on a GPU a 128th of what is free on the rank that has least."""
    moves: str = "auto"
    """What passes whose ranks carry their own rows bring to the other ranks: rows of 'A', 'weights'
    with the operators' relaxations (wherever they can move; not where alpha is in use), or 'auto',
    which counts the bytes of both for every part of a pass. The bounds are the same."""
    final_rows: str = "auto"
    """Rows of the final pass: 'whole' on every rank, each rank its 'own', or 'auto'."""
    whole_rows_limit: int = 64
    """With 'auto': up to this many rows the final pass is whole."""
    return_A_rows: str = "whole"
    """`return_A` gives all rows ('whole', gathered) or the rank's 'own'."""
    form_limit: int = FORM_LIMIT
    """Numbers in the affine form of one node ([B, node, perturbed inputs], see
    `operators.affine.form`) up to which transformers' norms and attention use it; 0 for boxes
    alone. Its memory and the time of a pass grow with it, and so does tightness."""
    form_memory: float | None = None
    """MiB of the affine forms of replicated nodes that every rank keeps whole. Of those beyond it
    each rank keeps some positions, and passes bring together what they reach (not with gradients
    or alpha). The bounds are the same. None: 16 MiB on a CPU; on a GPU a sixteenth of what is free
    on the rank that has least."""
    optimize_intermediate: str | bool = "auto"
    """CROWN-Optimized: whether the bounds of intermediate nodes have an alpha of their own (as in
    auto_LiRPA), and so are computed again in every iteration. False: they are CROWN's, computed
    once, and alpha serves the final pass alone. 'auto': False for models with attention, where
    alpha for all rows of all nodes fills the memory, True for others."""
    rounding: str = "nearest"
    """'nearest': bounds as floating-point arithmetic rounds them. 'outward': every bound is widened
    by a proven limit on its rounding error, so that it holds for the network in real arithmetic
    (`lirpa_megatron.rounding`): float64, operators of which such a limit is known. Fixed when the
    module is built."""
    compare_crown_with_ibp: bool = False
    """Intersect CROWN's intermediate bounds with IBP's."""
    sparse_intermediate_bounds: bool = True
    """auto_LiRPA's: where only ReLUs make use of a node's bounds, CROWN bounds the neurons alone
    that interval arithmetic, from what is known of the layer before, does not show to be stable
    (all, where these are more than its `minimum_sparsity`, 0.9 of them). Products leave out neurons
    that a ReLU cuts off. False: everything is computed."""
    sparse_spec_alpha: bool = True
    """auto_LiRPA's: with the option above, alpha-CROWN too bounds the neurons alone that are not
    known to be stable, by CROWN or by the best bounds of earlier iterations, and the others keep
    these. False: alpha for all rows."""
    check_live: bool = True
    """The model's own forward is run on the clean input when the graph is built and in every
    `compute_bounds`, and compared with the graph's value (`live_check`). False leaves that out, for
    models too large to be run: nothing then shows that the bounds are of this very model."""
    check_live_every: int = 100
    """In training: at the first of so many calls of `compute_bounds`, and not at the others."""

    def __post_init__(self) -> None:
        limit = self.max_spec_rows
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"max_spec_rows is {limit!r}: give a whole number of at least 1")
        memory = self.pass_memory
        if memory is not None and not (isinstance(memory, (int, float)) and memory > 0):
            raise ValueError(f"pass_memory is {memory!r}: give a number of MiB above 0")
        memory = self.form_memory
        if memory is not None and not (isinstance(memory, (int, float)) and memory >= 0):
            raise ValueError(f"form_memory is {memory!r}: give a number of MiB, or 0")
        if self.rounding not in ("nearest", "outward"):
            raise ValueError(f"rounding is {self.rounding!r}: choose nearest or outward")
        if self.rounding == "outward" and self.moves == "weights":
            raise ValueError("moves='weights' does not go with rounding='outward': choose 'A'")
        if self.moves not in ("auto", "A", "weights"):
            raise ValueError(f"moves is {self.moves!r}: choose auto, A or weights")
        if self.final_rows not in ("auto", "whole", "own"):
            raise ValueError(f"final_rows is {self.final_rows!r}: choose auto, whole or own")
        if self.return_A_rows not in ("whole", "own"):
            raise ValueError(f"return_A_rows is {self.return_A_rows!r}: choose whole or own")
        for name in ("sparse_intermediate_bounds", "sparse_spec_alpha", "check_live"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose True or False")
        every = self.check_live_every
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"check_live_every is {every!r}: give a whole number of at least 1")
        if self.optimize_intermediate not in ("auto", True, False):
            raise ValueError(
                f"optimize_intermediate is {self.optimize_intermediate!r}: "
                "choose 'auto', True or False"
            )

    def for_host(self) -> dict[str, bool]:
        """What the host's own loop of alpha-CROWN has to know: to keep the best bounds so far."""
        return {
            "sparse_intermediate_bounds": self.sparse_intermediate_bounds and self.sparse_spec_alpha
        }

    @classmethod
    def split(
        cls, bound_opts: Mapping[str, Any] | None, base: OwnOptions | None = None
    ) -> tuple[OwnOptions, dict[str, Any]]:
        """This package's options (over `base`) and the rest, which are the host's."""
        names = {f.name for f in fields(cls)}
        given = dict(bound_opts or {})
        own = {name: given.pop(name) for name in list(given) if name in names}
        return (replace(base, **own) if base else cls(**own)), given


def check_options(bound_opts: Mapping[str, Any]) -> None:
    """Refuses auto_LiRPA's options that are not exact or not rank-safe on shards.

    Raises:
        NotImplementedError: naming the option.
    """
    optimize_args = bound_opts.get("optimize_bound_args", {})
    pinned = (
        (bound_opts, auto_lirpa.PINNED_OPTIONS),
        (optimize_args, auto_lirpa.PINNED_OPTIMIZE_ARGS),
    )
    for given, allowed in pinned:
        for name, value in allowed.items():
            if name in given and given[name] != value:
                raise NotImplementedError(
                    f"option {name}={given[name]!r} is not available on a sharded model "
                    f"(its decisions would differ between ranks): leave it at {value!r}"
                )
    if bound_opts.get("crown_batch_size", float("inf")) != float("inf"):
        raise NotImplementedError(
            "option crown_batch_size is not available on a sharded model (its chunks follow each "
            "rank's free memory): use max_spec_rows"
        )


def check_set_later(old: OwnOptions, new: OwnOptions) -> None:
    """Refuses options that a BoundedModule is built with.

    Raises:
        ValueError: naming the option.
    """
    if new.rounding != old.rounding:
        raise ValueError(
            f"rounding is {old.rounding!r} in this BoundedModule: build another one to change it"
        )


def check_method(method: str | None) -> str:
    """The method under one of the names in `METHODS`.

    Raises:
        NotImplementedError: a method of auto_LiRPA that is not available on shards.
        ValueError: no such method.
    """
    name = str(method).lower()
    if name in _SPELLINGS:
        return _SPELLINGS[name]
    known = ", ".join((*METHODS, "auto"))
    if "forward" in name or "dynamic" in name:
        raise NotImplementedError(
            f"method {method!r} is not available on a sharded model; the methods are {known}"
        )
    raise ValueError(f"unknown method {method!r}; the methods are {known}")


_UNAVAILABLE = (
    "IBP", "forward", "average_A", "need_A_only", "cutter", "intermediate_constr", "alpha_idx",
    "aux_reference_bounds", "update_mask", "decision_thresh", "ibp_nodes", "cache_bounds",
)


def check_compute_bounds(kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments of `compute_bounds` that are not available on shards, by name."""
    for name in _UNAVAILABLE:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(
                f"compute_bounds({name}=...) is not available on a sharded model"
            )


def check_output(final: auto_lirpa.Bound, is_sharded: bool, C: Any, method: str) -> None:
    """Refuses methods and specifications that a final node does not go with.

    Args:
        final: the node to bound.
        is_sharded: whether each rank has its own features of it.
        C: the specification [B, S, features] or None.
        method: one of `METHODS`.
    """
    if is_sharded and C is None and method == "CROWN-Optimized":
        raise NotImplementedError(
            "CROWN-Optimized of a sharded output needs C (each rank would decide on its own "
            "features when to stop): pass C, or build the layer with gather_output=True"
        )
    features = final.output_shape[-1] if len(final.output_shape) > 1 else 1
    if C is not None and C.shape[-1] != features:
        raise ValueError(
            f"C has {C.shape[-1]} output features, the output node has {features} on this rank"
        )


def text_of(kwargs: Mapping[str, Any]) -> str:
    """Keyword arguments that must agree between ranks (tensors in them have ranks' own shapes)."""
    plain = {k: v for k, v in kwargs.items() if isinstance(v, (str, bool, int, float))}
    return repr(sorted(plain.items()))
