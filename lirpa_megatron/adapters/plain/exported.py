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
function here: `operators.elementwise.functions` names the aten operators that they are.

An error raised here must not be a RuntimeError (nor NotImplementedError, which is one): the
exporter would take it as a sign to go on without the operator. Use `errors.UserError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS, Function

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
    registry, opset = auto_lirpa.symbolic_registry()
    before: list[tuple[str, Callable | None]] = []
    try:
        of_table = {
            name: _elementwise(function, name)
            for function in FUNCTIONS.values() for name in function.aten
        }
        for name, function in {**of_table, **SYMBOLS, **(more or {})}.items():
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


def shape_of(value: Any) -> list[int | None] | None:
    """The sizes of a value, None for those that vary (the batch) or are not known."""
    kind = value.type()
    return kind.varyingSizes() if kind.kind() == "TensorType" else None


def _value_of(node: Any) -> Any:
    from torch.onnx import symbolic_helper

    return symbolic_helper._node_get(node, "value")


@symbolic("aten::gelu")
def _gelu(g: Any, usual: Callable, x: Any, approximate: Any) -> Any:
    return own(g, "GeluTanh" if text(approximate) == "tanh" else "GeluErf", x)


@symbolic("aten::pow")
def _pow(g: Any, usual: Callable, x: Any, exponent: Any) -> Any:
    if is_constant(x) and not is_constant(exponent):
        return own(g, "Exponential", exponent, base_f=number(x, "the base of a power"))
    return own(g, "Power", x, exponent_f=number(exponent, "the exponent of a power"))


def _elementwise(function: Function, name: str) -> Callable:
    """The symbolic function of an entry of the table, for one operator of the trace."""
    given = function.aten[name]

    def emit(g: Any, usual: Callable, x: Any, *arguments: Any) -> Any:
        if isinstance(given, Mapping):
            numbers = given
        else:
            numbers = {
                key: number(value, f"{key} of {name}")
                for key, value in zip(given, arguments, strict=False) if not is_none(value)
            }
        return own(g, function.name, x, **{f"{key}_f": value for key, value in numbers.items()})

    return emit


@symbolic("aten::prelu", "aten::_prelu_kernel")
def _prelu(g: Any, usual: Callable, x: Any, weight: Any) -> Any:
    return own(g, "PRelu", x, weight)


@symbolic("aten::mul")
def _mul(g: Any, usual: Callable, a: Any, b: Any) -> Any:
    if _same(a, b):
        return own(g, "Power", a, exponent_f=2.0)
    return usual()


@symbolic("aten::div")
def _div(g: Any, usual: Callable, a: Any, b: Any, *rounding: Any) -> Any:
    """A quotient of two values is a product with a reciprocal; x / (1 + |x|) is softsign."""
    if is_constant(b) or _is_parameter(b) or not all(is_none(mode) for mode in rounding):
        return usual()
    if _is_one_plus_size(b, a):
        return own(g, "Softsign", a)
    inverse = own(g, "Power", b, exponent_f=-1.0)
    if is_constant(a) or _is_parameter(a) or shape_of(a) != shape_of(b):
        return g.op("Mul", a, inverse)
    return own(g, "Product", a, inverse)


@symbolic("aten::maximum", "aten::fmax")
def _maximum(g: Any, usual: Callable, a: Any, b: Any) -> Any:
    return _extreme(g, a, b, "Maximum", "least")


@symbolic("aten::minimum", "aten::fmin")
def _minimum(g: Any, usual: Callable, a: Any, b: Any) -> Any:
    return _extreme(g, a, b, "Minimum", "most")


@symbolic("aten::max")
def _max(g: Any, usual: Callable, x: Any, other: Any = None, keep: Any = None) -> Any:
    return usual() if other is None or keep is not None else _maximum(g, usual, x, other)


@symbolic("aten::min")
def _min(g: Any, usual: Callable, x: Any, other: Any = None, keep: Any = None) -> Any:
    return usual() if other is None or keep is not None else _minimum(g, usual, x, other)


@symbolic("aten::softmax")
def _softmax(g: Any, usual: Callable, x: Any, dim: Any, dtype: Any = None) -> Any:
    return _along(g, "Softmax", x, dim, dtype)


@symbolic("aten::log_softmax")
def _log_softmax(g: Any, usual: Callable, x: Any, dim: Any, dtype: Any = None) -> Any:
    return _along(g, "LogSoftmax", x, dim, dtype)


def _along(g: Any, name: str, x: Any, dim: Any, dtype: Any) -> Any:
    shape = shape_of(x)
    if shape is None or not is_none(dtype):
        raise UserError(f"{name} with a dtype of its own, or of unknown shape: leave dtype out")
    at = int(number(dim, f"dim of {name}")) % len(shape)
    if at == 0:
        raise UserError(f"{name} over dimension 0 mixes the samples of a batch")
    return own(g, name, x, dim_i=at - len(shape))


def _extreme(g: Any, a: Any, b: Any, name: str, bound: str) -> Any:
    for x, other in ((a, b), (b, a)):
        if is_constant(other) and tensor_of(other).numel() == 1:
            return own(g, "Clamp", x, **{f"{bound}_f": float(tensor_of(other))})
    difference = g.op("Sub", a, b)
    if shape_of(a) is None or shape_of(a) != shape_of(b):
        # Sums of different shapes are the host's: max = b + relu(a - b), min = a - relu(a - b).
        above = g.op("Relu", difference)
        return g.op("Add", b, above) if name == "Maximum" else g.op("Sub", a, above)
    difference.setType(a.type())
    return own(g, name, difference, a, b)


def _same(a: Any, b: Any) -> bool:
    return a.debugName() == b.debugName()


def _is_parameter(value: Any) -> bool:
    """Whether a value is a parameter or buffer of the model (or its input)."""
    return value.node().kind() == "prim::Param"


def _is_one_plus_size(value: Any, x: Any) -> bool:
    """Whether a value is 1 + |x|."""
    if value.node().kind() != "onnx::Add":
        return False
    terms = list(value.node().inputs())
    for size, one in (terms, terms[::-1]):
        if size.node().kind() == "lirpa_megatron::Abs" and is_constant(one):
            return _same(next(iter(size.node().inputs())), x) and float(tensor_of(one)) == 1
    return False
