"""Options and arguments: this package's own, and which of auto_LiRPA's are refused."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.limits import FORM_LIMIT
from lirpa_megatron.operators.tuning import Tuning

METHODS = ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized")
"""Methods of `compute_bounds`, from the cheapest on; auto_LiRPA's other spellings of them are
accepted too, and 'auto' (`cheaper_first`)."""
FORWARD = ("forward", "forward+backward")
"""The methods with affine forms that go through the network (`lirpa_megatron.forward`)."""

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
    "forward": "forward",
    "forward+backward": "forward+backward",
    "forward+crown": "forward+backward",
}


@dataclass(frozen=True)
class OwnOptions:
    """Entries of `bound_opts` that auto_LiRPA does not have."""

    max_spec_rows: int | None = None
    """Maximum number of rows of A that a rank carries at once. None: as many as fit into
    `pass_memory`. Must be the same on every rank."""
    pass_memory: float | None = None
    """MiB for the rows of A that a rank carries at once (both sides, at the node where they are
    largest); a pass needs a small multiple of this. None: 16 MiB on a CPU, which fits its cache,
    shared by the ranks; on a GPU a 128th of the free memory, on the rank that has least."""
    moves: str = "auto"
    """What ranks exchange in passes in which each carries its own rows: rows of 'A'; 'weights' with
    the operators' relaxations, where they can move (not where alpha is used); or 'auto', which
    counts the bytes of both for each part of a pass. The bounds are the same."""
    final_rows: str = "auto"
    """Rows of the final pass: 'whole' on every rank, each rank its 'own' share, or 'auto'."""
    whole_rows_limit: int = 64
    """With final_rows 'auto', the final pass is whole up to this many rows."""
    return_A_rows: str = "whole"
    """Whether `return_A` returns all rows, gathered ('whole'), or the rank's 'own'."""
    form_limit: int = FORM_LIMIT
    """Size of one node's affine form ([B, node, perturbed inputs], see `operators.affine.form`) up
    to which transformers' norms and attention use it; 0 uses boxes alone. Forms take memory and
    time, and tighten the bounds."""
    form_memory: float | None = None
    """MiB of the affine forms of replicated nodes that every rank holds in full. Of the others each
    rank holds some positions, and a pass gathers those that it reaches (not with gradients or
    alpha). The bounds are the same. None: 16 MiB on a CPU; on a GPU a sixteenth of the free
    memory, on the rank that has least."""
    optimize_intermediate: str | bool = "auto"
    """CROWN-Optimized: whether alpha also optimises the bounds of intermediate nodes (as in
    auto_LiRPA), which are then recomputed in every iteration. False: CROWN computes them once, and
    alpha is used only in the final pass. 'auto': False for models with attention, where alpha for
    all rows of all nodes fills the memory, otherwise True."""
    rounding: str = "nearest"
    """'nearest': bounds as floating-point arithmetic rounds them. 'outward': every bound is widened
    by a proven limit on its rounding error, so that it holds for the network in real arithmetic
    (`lirpa_megatron.rounding`); needs float64, and operators with a known limit. Cannot be changed
    once the module is built."""
    order: int = 1
    """Forward methods: degree of the polynomials in the set's parameters. 1: affine forms, for all
    sets. For sets of few dimensions, such as a segment or a hull of few words, higher degrees are
    tighter: up to 2 for 16 dimensions, 3 for 8, 8 for one."""
    form_symbols: int = 1024
    """Forward methods: how many errors of relaxations keep a symbol of their own (networks without
    tokens); others are bounded by boxes and balls."""
    kept_errors: int | None = None
    """Forward methods, networks with tokens, order 1: how many errors of relaxations go on from
    layer to layer as symbols of their own, besides one ball of all others. Tighter,
    and as many more coefficients. 0 in training and with norms of queries and keys. None: 256 for
    sets of at least 64 dimensions where at most 2048 numbers [positions x hidden] of a norm's input
    move, otherwise 0."""
    adjoint_rows: int = 64
    """Forward methods: for how many rows of the specification, those with the least lower bounds,
    the errors are bounded through the linearised network, one backward pass each."""
    refined_rows: int | None = None
    """Forward methods: inputs of norms with at most so many numbers [positions x hidden] have the
    errors of each number bounded through the linearised network: much tighter, and one backward
    pass through the layers so far for each. Not in training. 0: none. None: those of up to 1024
    numbers, from the first layer on, while that costs no more than the forward pass itself or a
    second of one core."""
    compare_crown_with_ibp: bool = False
    """Intersect CROWN's intermediate bounds with IBP's."""
    sparse_intermediate_bounds: bool = True
    """As in auto_LiRPA: if only ReLUs use a node's bounds, CROWN bounds only the neurons that
    interval arithmetic, starting from the bounds of the previous layer, does not prove stable (all
    neurons, if these are more than `minimum_sparsity`, 0.9). Products skip neurons that a ReLU
    cuts off. False: everything is computed."""
    sparse_spec_alpha: bool = True
    """As in auto_LiRPA: together with the option above, alpha-CROWN bounds only the neurons that
    neither CROWN nor an earlier iteration proves stable; the others keep their bounds. False: all
    rows have alpha."""
    check_live: bool = True
    """Run the model's own forward on the clean input when the graph is built and in every
    `compute_bounds`, and compare it with the graph's value (`live_check`). False skips this, for
    models that are too large to run; nothing then shows that the bounds describe this model."""
    check_live_every: int = 100
    """In training, the check runs once in this many calls of `compute_bounds`."""
    tuning: Tuning = field(default_factory=Tuning)
    """Sizes above which work is split differently. Cannot be changed once the module is built.
    """

    def __post_init__(self) -> None:
        limit = self.max_spec_rows
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"max_spec_rows is {limit!r}: give a whole number of at least 1")
        memory = self.pass_memory
        if memory is not None and not (isinstance(memory, (int, float)) and memory > 0):
            raise ValueError(f"pass_memory is {memory!r}: give a number of MiB above 0")
        for name, least in (("order", 1), ("form_symbols", 0), ("adjoint_rows", 0),
                            ("kept_errors", 0), ("refined_rows", 0)):
            value = getattr(self, name)
            if value is None and name in ("kept_errors", "refined_rows"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
        if self.order > 8:
            raise ValueError(f"order is {self.order}: choose a degree from 1 to 8")
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
        """Options that the host's alpha-CROWN loop needs, to keep the best bounds so far."""
        return {
            "sparse_intermediate_bounds": self.sparse_intermediate_bounds and self.sparse_spec_alpha
        }

    @classmethod
    def split(
        cls, bound_opts: Mapping[str, Any] | None, base: OwnOptions | None = None
    ) -> tuple[OwnOptions, dict[str, Any]]:
        """Splits options into this package's (applied over `base`) and the host's."""
        names = {f.name for f in fields(cls)}
        given = dict(bound_opts or {})
        own = {name: given.pop(name) for name in list(given) if name in names}
        return (replace(base, **own) if base else cls(**own)), given


def check_options(bound_opts: Mapping[str, Any]) -> None:
    """Refuses auto_LiRPA options that are not exact or not rank-safe on shards.

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
    """Refuses invalid options of a BoundedModule.

    Raises:
        ValueError: naming the option.
    """
    for name in ("rounding", "tuning"):
        value = getattr(old, name)
        if getattr(new, name) != value:
            raise ValueError(
                f"{name} is {value!r} in this BoundedModule: build another one to change it"
            )


def check_method(method: str | None) -> str:
    """The method's name in `METHODS`.

    Raises:
        NotImplementedError: a method of auto_LiRPA that is not available on shards.
        ValueError: no such method.
    """
    name = str(method).lower()
    if name in _SPELLINGS:
        return _SPELLINGS[name]
    known = ", ".join((*METHODS, *FORWARD, "auto"))
    if "forward" in name or "dynamic" in name:
        raise NotImplementedError(
            f"method {method!r} is not available on a sharded model; the methods are {known}"
        )
    raise ValueError(f"unknown method {method!r}; the methods are {known}")


_UNAVAILABLE = (
    "IBP", "forward", "average_A", "need_A_only", "cutter", "intermediate_constr", "alpha_idx",
    "aux_reference_bounds", "update_mask", "ibp_nodes", "cache_bounds",
)


def check_compute_bounds(kwargs: Mapping[str, Any], nodes: Container[str]) -> None:
    """Refuses arguments of `compute_bounds` that are not available on shards, or name no node.

    Args:
        kwargs: the arguments, under the host's names.
        nodes: names of the graph's nodes.

    Raises:
        NotImplementedError: naming an argument that is not available.
        ValueError: bounds that the caller gives for a node that the graph does not have. The host
            would ignore them.
    """
    for name in _UNAVAILABLE:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(
                f"compute_bounds({name}=...) is not available on a sharded model"
            )
    for host_name, name in zip(
        auto_lirpa.GIVEN_BOUNDS, ("interm_bounds", "reference_bounds"), strict=True
    ):
        given = kwargs.get(host_name)
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(
                f"{name} is a {type(given).__name__}: give a dictionary, node name -> (lower, "
                "upper)"
            )
        unknown = next((node for node in given or () if node not in nodes), None)
        if unknown is not None:
            raise ValueError(
                f"{name} has bounds of {unknown!r}, but the graph has no such node: "
                "named_nodes() lists the names"
            )


def check_output(final: auto_lirpa.Bound, is_sharded: bool, C: Any, method: str) -> None:
    """Refuses methods and specifications that the final node does not allow.

    Args:
        final: the node to bound.
        is_sharded: whether each rank has its own features of the node.
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


def checked_arguments(module: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `compute_bounds` under the host's names, with the method's own name.

    Raises:
        NotImplementedError: an argument or method that is not available, by name.
        ValueError: no such method.
    """
    kwargs = auto_lirpa.translate_compute_bounds(dict(kwargs))
    if module.stages is not None:
        module.stages.check_arguments(kwargs)
    check_compute_bounds(kwargs, module.named_nodes())
    kwargs["method"] = check_method(kwargs.get("method", "CROWN"))
    check_forward(module, kwargs)
    if kwargs.get("decision_thresh") is not None:
        if kwargs["method"] != "CROWN-Optimized":
            raise NotImplementedError(
                f"compute_bounds(decision_thresh=...) with method {kwargs['method']!r}: it says "
                "when CROWN-Optimized and 'auto' have done enough"
            )
        if not kwargs.get("bound_lower", True):
            raise ValueError("decision_thresh is for lower bounds: leave out bound_lower=False")
    return kwargs


def check_forward(module: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuses what a forward method does not offer, by name.

    Args:
        module: a BoundedModule.
        kwargs: of `compute_bounds`; any method.
    """
    method = kwargs["method"]
    if method not in FORWARD:
        return
    if module.rounding is not None:
        raise NotImplementedError(f"method {method!r} with rounding='outward': choose CROWN")
    refused = ("needed_A_dict", "reference_bounds", "reuse_alpha", *auto_lirpa.GIVEN_BOUNDS)
    refused = refused if method == "forward+backward" else ("return_A", *refused)
    for name in refused:
        if kwargs.get(name):
            raise NotImplementedError(f"compute_bounds({name}=...) with method {method!r}: "
                                      "choose CROWN")


def for_host(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the host's `compute_bounds`: a forward method's passes take CROWN's place."""
    given = {name: value for name, value in kwargs.items() if name != "decision_thresh"}
    return {**given, "method": "CROWN"} if kwargs["method"] in FORWARD else given


def text_of(kwargs: Mapping[str, Any]) -> str:
    """Keyword arguments that must agree between ranks (tensors in them may differ in shape)."""
    plain = {k: v for k, v in kwargs.items() if isinstance(v, (str, bool, int, float))}
    if hasattr(threshold := kwargs.get("decision_thresh"), "tolist"):
        plain["decision_thresh"] = threshold.tolist()
    return repr(sorted(plain.items()))
