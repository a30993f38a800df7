"""auto_LiRPA as the host: the only module that knows which version is installed.

Two versions are supported, unmodified: 0.3 (the one on PyPI) and 0.7.1 (its git main). What
differs between them (names of options, signatures, storage of alpha) is translated here, and the
attributes that 0.3 expects of older torch and numpy releases are lent to it: during its import and
during the conversion of a model, never for longer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lirpa_megatron.compat import requirements

requirements.check()

import torch  # noqa: E402

SUPPORTED = ("0.3", "0.7.1")
_HOW = (
    "run `make setup`, or `pip install --no-deps auto_LiRPA==0.3 appdirs` "
    "(see docs/install.md)"
)


@contextlib.contextmanager
def _lent(*loans: tuple[Any, str, Any]) -> Iterator[None]:
    """Sets attributes for the duration of a block, then puts back what was there."""
    missing = object()
    saved = [(owner, name, getattr(owner, name, missing)) for owner, name, _ in loans]
    for owner, name, value in loans:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, old in saved:
            if old is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


def _onnx_globals() -> Any:
    try:
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS
    except ImportError:  # torch < 2.9
        from torch.onnx._globals import GLOBALS
    return GLOBALS


def symbolic_registry() -> tuple[Any, int]:
    """torch.onnx's registry of symbolic functions, and the opset of the host's export."""
    try:
        from torch.onnx._internal.torchscript_exporter import registration
    except ImportError:  # torch < 2.9
        from torch.onnx._internal import registration
    return registration.registry, _onnx_globals().export_onnx_opset_version


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch announces at each trace that its TorchScript exporter is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*torch.onnx.*")
        warnings.filterwarnings("ignore", message=".*ONNX.*")
        yield


def _set_jit_profiling(executor: bool, mode: bool) -> tuple[bool, bool]:
    """Sets TorchScript's profiling executor and mode; returns what they were."""
    old = torch._C._jit_set_profiling_executor(executor)
    return old, torch._C._jit_set_profiling_mode(mode)


def _import_auto_lirpa() -> types.ModuleType:
    if importlib.util.find_spec("auto_LiRPA") is None:
        raise ImportError(f"auto_LiRPA is not installed: {_HOW}")
    import numpy
    import torch.onnx.symbolic_helper as symbolic_helper

    # auto_LiRPA would set the importing program's warning filters and root logger.
    nothing = lambda *_, **__: None  # noqa: E731
    loans = [(warnings, "simplefilter", nothing), (logging, "basicConfig", nothing)]
    profiling = _set_jit_profiling(True, True)
    if not hasattr(symbolic_helper, "_set_opset_version"):
        loans.append((symbolic_helper, "_set_opset_version", lambda version: None))
    lent_module = None
    if importlib.util.find_spec("numpy.lib.arraysetops") is None:  # 0.3 imports isin, never uses it
        lent_module = types.ModuleType("numpy.lib.arraysetops")
        lent_module.isin = numpy.isin
        sys.modules["numpy.lib.arraysetops"] = lent_module
    try:
        with _quiet_torch(), _lent(*loans):
            import auto_LiRPA
            import auto_LiRPA.bound_ops
    except ImportError as error:
        raise ImportError(f"auto_LiRPA cannot be imported ({error}): {_HOW}") from error
    finally:
        if lent_module is not None:
            sys.modules.pop("numpy.lib.arraysetops", None)
        _set_jit_profiling(*profiling)  # auto_LiRPA turns it off for the whole program
    if auto_LiRPA.__version__ not in SUPPORTED:
        raise ImportError(
            f"auto_LiRPA {auto_LiRPA.__version__} is not supported "
            f"({' and '.join(SUPPORTED)} are): {_HOW}"
        )
    return auto_LiRPA


auto_LiRPA = _import_auto_lirpa()
VERSION: str = auto_LiRPA.__version__
IS_03 = VERSION == "0.3"

from auto_LiRPA import BoundedModule as HostBoundedModule  # noqa: E402, F401
from auto_LiRPA import (  # noqa: E402, F401
    BoundedParameter,
    BoundedTensor,
    PerturbationLpNorm,
    register_custom_op,
)
from auto_LiRPA.bound_ops import (  # noqa: E402, F401
    Bound,
    BoundActivation,
    BoundBuffers,
    BoundInput,
    BoundLinear,
    BoundOptimizableActivation,
    BoundParams,
    BoundRelu,
)
from auto_LiRPA.operators.base import Interval  # noqa: E402, F401
from auto_LiRPA.utils import OneHotC, eyeC  # noqa: E402, F401

# Options that would make control flow depend on values one rank alone holds, or that split a pass
# in a way the layouts of A do not know. They are pinned, and asking for another value is refused.
PINNED_OPTIONS: dict[str, Any] = {
    "conv_mode": "matrix",
    "sparse_intermediate_bounds": False,
    "sparse_conv_intermediate_bounds": False,
    "sparse_intermediate_bounds_with_ibp": False,
    "sparse_features_alpha": False,
    "sparse_spec_alpha": False,
    "enable_opt_interm_bounds": False,
    "forward_refinement": False,
    "dynamic_forward": False,
    "loss_fusion": False,
    "clip_in_alpha_crown": False,
    "bound_every_node": False,
}
PINNED_OPTIMIZE_ARGS: dict[str, Any] = {
    "enable_beta_crown": False,
    "pruning_in_iteration": False,
    "use_float64_in_last_iteration": False,
    "intermediate_beta": False,
    "tighten_input_bounds": False,
    "max_time": None,
    "apply_output_constraints_to": [],
    "directly_optimize": [],
}
_INTERM_BOUNDS = "intermediate_layer_bounds" if IS_03 else "interm_bounds"
GIVEN_BOUNDS = (_INTERM_BOUNDS, "reference_bounds")
"""Arguments of `compute_bounds` with the caller's own bounds of intermediate nodes."""
_RENAMED_ARGS = {"fix_interm_bounds": "fix_intermediate_layer_bounds"}
INIT_ALPHA = "init_slope" if IS_03 else "init_alpha"


def translate_compute_bounds(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`compute_bounds` keyword arguments under the names of the installed version.

    Args:
        kwargs: arguments under either version's names.
    """
    both = {"intermediate_layer_bounds", "interm_bounds"}
    return {(_INTERM_BOUNDS if name in both else name): v for name, v in kwargs.items()}


def translate_optimize_args(args: dict[str, Any]) -> dict[str, Any]:
    """`optimize_bound_args` under the names of the installed version."""
    names = _RENAMED_ARGS if IS_03 else {old: new for new, old in _RENAMED_ARGS.items()}
    return {names.get(name, name): value for name, value in args.items()}


@contextlib.contextmanager
def _default_dtype(inputs: Any) -> Iterator[None]:
    """torch's default dtype is that of the inputs: the host makes constants and alpha of it."""
    tensors = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    floating = [x.dtype for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
    before = torch.get_default_dtype()
    torch.set_default_dtype(floating[0] if floating else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def conversion(inputs: Any = ()) -> Iterator[None]:
    """What the conversion of a model needs lent: attributes for 0.3, and a fixed graph.

    Args:
        inputs: the model's example input or tuple of them.

    0.7.1 fuses Linear-ReLU-Linear-ReLU chains by comparing the *values* of weights; on shards
    that would be decided rank by rank, so that one optimisation is off.
    """
    loans: list[tuple[Any, str, Any]] = [(_onnx_globals(), "autograd_inlining", False)]
    if IS_03:
        import torch.onnx.symbolic_helper as symbolic_helper

        if not hasattr(torch._C.Node, "__getitem__"):
            loans.append((torch._C.Node, "__getitem__", symbolic_helper._node_get))
        if not hasattr(torch, "_six"):
            loans.append((torch, "_six", types.SimpleNamespace(string_classes=(str,))))
    else:
        import auto_LiRPA.optimize_graph as optimize_graph

        loans.append((optimize_graph, "optimize_relu_relation", lambda model: None))
    with _quiet_torch(), _lent(*loans), _default_dtype(inputs):
        yield


@contextlib.contextmanager
def running(inputs: Any = ()) -> Iterator[None]:
    """While the host computes: TorchScript as it wants it, its progress prints off stdout.

    Args:
        inputs: the tuple of inputs.
    """
    profiling = _set_jit_profiling(False, False)
    try:
        with contextlib.redirect_stdout(io.StringIO()), _default_dtype(inputs):
            yield
    finally:
        _set_jit_profiling(*profiling)


@contextlib.contextmanager
def graphs_checked(check: Callable[[Any], None]) -> Iterator[None]:
    """While models are converted `check` sees each graph before the host's operators do.

    Args:
        check: called with a torch graph of ONNX's operators.
    """
    import auto_LiRPA.parse_graph as parse_graph

    parse = parse_graph.parse_graph

    def checked(graph: Any, *args: Any) -> Any:
        check(graph)
        return parse(graph, *args)

    with _lent((parse_graph, "parse_graph", checked)):
        yield


def named_members(self: Any, get_members_fn: Any, prefix: str = "", recurse: bool = True,
                  remove_duplicate: bool = True, **_: Any) -> Iterator[Any]:
    """`_named_members` as torch calls it today (0.3's has an older signature)."""
    parent = HostBoundedModule._named_members
    if IS_03:
        return parent(self, get_members_fn, prefix, recurse)
    return parent(self, get_members_fn, prefix, recurse, remove_duplicate)


def known_bounds(node: Bound) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The lower and upper bounds that the last call left at a node; None if there are none."""
    pair = getattr(node, "interval", None)
    if pair is None:
        pair = getattr(node, "lower", None), getattr(node, "upper", None)
    return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])


def has_bounds(node: Bound) -> bool:
    """Whether the node's lower and upper bounds for the current input are known."""
    if IS_03:
        return getattr(node, "lower", None) is not None
    return node.is_lower_bound_current()


def reads_bounds(node: Bound) -> bool:
    """Whether the operator makes use of bounds of an input."""
    return bool(getattr(node, "nonlinear", False) or getattr(node, "requires_input_bounds", ()))


def is_optimized(node: Bound, start: Bound) -> bool:
    """Whether `node` uses alpha in a backward pass that started at `start`."""
    return (
        isinstance(node, BoundOptimizableActivation)
        and node.opt_stage in ("opt", "reuse")
        and start.name in node.alpha
    )


@contextlib.contextmanager
def without_alpha(node: Bound) -> Iterator[None]:
    """While the block runs the node relaxes as in plain CROWN, whatever stage the host is in."""
    stage = getattr(node, "opt_stage", None)
    if stage not in ("opt", "reuse"):
        yield
        return
    node.opt_stage = None
    try:
        yield
    finally:
        node.opt_stage = stage


def alpha_spec_dim(node: Bound) -> int:
    """The dimension of `node.alpha[start]` that runs over the rows of A."""
    return node.alpha_batch_dim - 1 if IS_03 else 1


def alpha_start_node(name: str, rows: int, is_final: bool) -> tuple:
    """One entry of `get_alpha_crown_start_nodes`: alpha for `rows` rows of start node `name`."""
    entry = (name, torch.Size([rows]), None)
    return entry if IS_03 else (*entry, is_final)


def bound_backward(node: Bound, lA: Any, uA: Any, start: Bound, rows: int) -> tuple:
    """`node.bound_backward` with the keyword arguments that the installed version expects.

    Args:
        node: the operator to go through.
        lA: coefficients for the lower bound at the node's output, [rows, B, *node shape] or None.
        uA: the same for the upper bound.
        start: the node where the backward pass started.
        rows: number of rows of A at this node (alpha has as many).

    Returns:
        `[(lA, uA) for each input], lbias, ubias`; a bias is [rows, B] or 0.
    """
    kwargs: dict[str, Any] = {}
    if not IS_03:
        kwargs = {"start_node": start, "unstable_idx": None, "start_shape": rows}
    elif isinstance(node, BoundRelu):
        kwargs = {"start_node": start, "unstable_idx": None}
    elif isinstance(node, BoundOptimizableActivation):
        kwargs = {"start_node": start, "start_shape": rows}
    result = node.bound_backward(lA, uA, *node.inputs, **kwargs)
    # Activations keep the A that entered them, for branching heuristics that are not used here.
    for name in ("lA", "uA"):
        if getattr(node, name, None) is not None:
            setattr(node, name, None)
    return result


def is_ball(ptb: Any) -> bool:
    """Whether a perturbation is an L1 or L2 ball."""
    return isinstance(ptb, PerturbationLpNorm) and ptb.norm != float("inf")


def roots(module: HostBoundedModule) -> Sequence[Bound]:
    """The graph's leaves (inputs, parameters, buffers, constants)."""
    return [module[name] for name in (module.root_name if IS_03 else module.root_names)]


def perturbed_inputs(module: HostBoundedModule) -> list[Bound]:
    """The inputs that are perturbed, in the graph's order."""
    return [node for node in roots(module) if node.perturbed]


@dataclass(frozen=True)
class BackwardCall:
    """A call of the host to `backward_general`, the same for both versions."""

    node: Bound
    """The node to bound."""
    C: Any
    """[B, S, *node shape]."""
    lower: bool
    upper: bool


def backward_call(args: tuple, kwargs: dict[str, Any]) -> BackwardCall:
    """Reads a call `backward_general(C, node, ...)` (0.3) or `(node, C, ...)` (0.7.1)."""
    names = ("C", "node") if IS_03 else ("bound_node", "C")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("average_A", "need_A_only", "initial_As", "unstable_idx", "update_mask"):
        value = given.get(name)
        if value is not None and value is not False:
            raise NotImplementedError(f"backward pass with {name} on a sharded model")
    node = given["node" if IS_03 else "bound_node"]
    return BackwardCall(node, given["C"], given.get("bound_lower", True),
                        given.get("bound_upper", True))
