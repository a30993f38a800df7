"""How torch's own operators reach the operators of this package.

The host traces a model and has torch.onnx's TorchScript exporter turn each operator of the trace
(`aten::softplus`) into nodes of the graph, by a *symbolic function*. While a model is converted
(`own_operators`), the symbolic functions of the names in `SYMBOLS` are replaced by ours, which emit
nodes of the domain `lirpa_megatron`; plain modules (nn.Softplus), functions (F.softplus, `x ** 2`)
and in-place forms (`relu_` is looked up as `relu`) all come through there. Afterwards the exporter
is as it was, and what is not in the table it never sees changed.

To add an operator: a function

    @symbolic("aten::thing", ...)
    def _thing(g, usual, x, *arguments):

that returns the value of the graph which stands for it. `usual(x, ...)` is what torch would emit
(for operands that are constants, or options that nobody uses). `own(g, NAME, *inputs,
attributes)` makes a node of ours, `number(value)` reads a constant argument. The arguments are
those of the aten operator, in the order of torch's native_functions.yaml; each is a value of the
graph, numbers too, and None is one for which `is_none` holds. Elementwise functions need no
function here: the table of `operators.functions` names the aten operators that they are.

An error raised here must not be a RuntimeError (nor NotImplementedError, which is one): the
exporter would take it as a sign to go on without the operator. Use `errors.UserError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lirpa_megatron import host
from lirpa_megatron.errors import UserError

SYMBOLS: dict[str, Callable] = {}
"""Name of an operator of the trace -> symbolic function (g, usual, *inputs) -> value."""


def symbolic(*names: str) -> Callable[[Callable], Callable]:
    """Enters a symbolic function under names of the trace ("aten::softplus")."""

    def enter(function: Callable) -> Callable:
        for name in names:
            SYMBOLS[name] = function
        return function

    return enter


@contextlib.contextmanager
def own_operators(more: dict[str, Callable] | None = None) -> Iterator[None]:
    """While the block runs, the exporter emits what `SYMBOLS` (and `more`) say."""
    registry, opset = host.symbolic_registry()
    before: list[tuple[str, Callable | None]] = []
    try:
        for name, function in {**SYMBOLS, **(more or {})}.items():
            group = registry.get_function_group(name)
            usual = None if group is None else group.get(opset)
            custom = None
            if group is not None and group._functions.overridden(opset):
                custom = group._functions[opset]  # of the program that imports us
            before.append((name, custom))
            registry.register(name, opset, _through(name, function, usual), custom=True)
        yield
    finally:
        for name, custom in before:
            registry.unregister(name, opset)
            if custom is not None:
                registry.register(name, opset, custom, custom=True)


def _through(name: str, function: Callable, usual: Callable | None) -> Callable:
    def emit(g: Any, *inputs: Any, **attributes: Any) -> Any:
        def as_usual(*values: Any) -> Any:
            if usual is None:
                raise UserError(f"torch.onnx has no operator for {name}: it cannot be bounded")
            return usual(g, *(values or inputs), **attributes)

        return function(g, as_usual, *inputs)

    return emit


def own(g: Any, name: str, *inputs: Any, like: Any = None, **attributes: Any) -> Any:
    """A node `lirpa_megatron::NAME`, of the type of its first input.

    Args:
        g: the graph.
        name: of the operator, as in `operators.CUSTOM_OPS`.
        *inputs: values of the graph.
        like: the value whose type the result has; the first input by default.
        **attributes: with torch.onnx's suffixes (`alpha_f`, `dim_i`, `mode_s`).
    """
    out = g.op(f"lirpa_megatron::{name}", *inputs, **attributes)
    return out.setType((inputs[0] if like is None else like).type())


def is_none(value: Any) -> bool:
    """Whether an argument was left out."""
    return value is None or value.node().mustBeNone()


def is_constant(value: Any) -> bool:
    """Whether a value of the graph is a constant, which the trace holds itself."""
    return value.node().kind() in ("onnx::Constant", "prim::Constant")


def tensor_of(value: Any) -> Any:
    """The tensor (or number, or text) of a constant."""
    return _value_of(value.node())


def number(value: Any, what: str) -> float:
    """A constant number.

    Args:
        value: of the graph.
        what: its name, for errors.

    Raises:
        UserError: it is no constant, or no single number.
    """
    if not is_constant(value):
        raise UserError(f"{what} must be a number, not a tensor that the model computes or trains")
    found = _value_of(value.node())
    if getattr(found, "numel", lambda: 1)() != 1:
        raise UserError(f"{what} must be one number, not a tensor of {found.numel()}")
    return float(found)


def text(value: Any) -> str:
    """A constant string."""
    return str(_value_of(value.node()))


def shape_of(value: Any) -> list[int] | None:
    """The sizes of a value, as far as the trace knows them."""
    kind = value.type()
    return kind.sizes() if kind.kind() == "TensorType" else None


def _value_of(node: Any) -> Any:
    from torch.onnx import symbolic_helper

    return symbolic_helper._node_get(node, "value")


@symbolic("aten::gelu")
def _gelu(g: Any, usual: Callable, x: Any, approximate: Any) -> Any:
    return own(g, "GeluTanh" if text(approximate) == "tanh" else "GeluErf", x)


@symbolic("aten::silu")
def _silu(g: Any, usual: Callable, x: Any) -> Any:
    return own(g, "Silu", x)
