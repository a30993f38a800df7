"""The table of elementwise functions: ONE ENTRY IS ALL THAT A FUNCTION NEEDS.

    @elementwise("Softplus", {"aten::softplus": ("beta", "threshold")})
    def softplus(beta: float = 1.0, threshold: float = 20.0) -> Curve:
        return Curve(value=..., slope=..., bends="+0", breaks=(threshold / beta,), left=..., ...)

defines the operator `lirpa_megatron::Softplus`: its tracing from nn.Softplus, F.softplus or a
method, its forward, IBP, CROWN and alpha-CROWN (`tangent_lines`). An entry maps operators of the
trace to the names of their arguments after x, in torch's order, or to a dict of fixed values.
Arguments that the model omits keep their defaults.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.elementwise import gated
from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.periodic import Sine


@dataclass(frozen=True)
class Function:
    """An entry of the table."""

    name: str
    """Name of the operator in the graph."""
    make: Callable[..., Curve]
    """Parameters -> the curve."""
    aten: Mapping[str, Sequence[str] | Mapping[str, float]] = field(default_factory=dict)
    """Operators of the trace -> names of their arguments after x, or fixed values."""

    @property
    def parameters(self) -> list[str]:
        """Names of the curve's parameters."""
        return list(inspect.signature(self.make).parameters)

    def curve(self, **numbers: float) -> Curve:
        """The curve for these parameters (defaults for the others)."""
        return _curve(self.make, tuple(sorted(numbers.items())))


@functools.lru_cache(maxsize=512)
def _curve(make: Callable[..., Curve], numbers: tuple[tuple[str, float], ...]) -> Curve:
    return make(**dict(numbers))


FUNCTIONS: dict[str, Function] = {}
"""Name of the operator -> entry."""

INF = math.inf


def elementwise(
    name: str, aten: Mapping[str, Sequence[str] | Mapping[str, float]] | None = None
) -> Callable[[Callable[..., Curve]], Callable[..., Curve]]:
    """Adds a function to the table."""

    def enter(make: Callable[..., Curve]) -> Callable[..., Curve]:
        FUNCTIONS[name] = Function(name, make, aten or {})
        return make

    return enter


def _one(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x)


# ------------------------------------------------------------- gated, sigmoid-like, softplus-like

elementwise("GeluErf")(lambda: gated.GELU_ERF)
elementwise("GeluTanh")(lambda: gated.GELU_TANH)


@elementwise("ErfGate")
def erf_gate(divisor: float) -> Curve:
    """x / 2 (1 + erf(x / divisor)): GELU with another number in place of the root of 2."""
    _near("erf(x / c)", divisor, math.sqrt(2))
    return gated.erf_gate(divisor, lambda x: gated.half_erf(x, divisor))


@elementwise("TanhGate")
def tanh_gate(factor: float, cubic: float) -> Curve:
    """x / 2 (1 + tanh(factor (x + cubic x^3))): GELU's approximation with numbers as rounded."""
    _near("tanh(a (x + b x^3))", factor, math.sqrt(2 / math.pi))
    _near("tanh(a (x + b x^3))", cubic, 0.044715)
    return gated.tanh_gate(factor, cubic, lambda x: gated.half_tanh(x, factor, cubic))


def _near(what: str, number: float, usual: float) -> None:
    """The shape of these curves is known for numbers near GELU's."""
    if not 0.9 * usual <= number <= 1.1 * usual:
        raise UserError(f"x (1 + {what}) with the number {number:g} is far from GELU's {usual:g}")


elementwise("Silu", {"aten::silu": ()})(lambda: gated.SILU)
elementwise("QuickGelu")(lambda: gated.QUICK_GELU)
elementwise("Mish", {"aten::mish": ()})(lambda: gated.MISH)


@elementwise("SquaredRelu")
def squared_relu() -> Curve:
    return Curve(
        lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x), left=(0, 0), right=(INF, INF),
    )


@elementwise("Tanh", {"aten::tanh": ()})
def tanh() -> Curve:
    return Curve(
        torch.tanh, lambda x: torch.cosh(x.clamp(-40, 40)).square().reciprocal(),
        "+-", (0.0,), left=(0, -1), right=(0, 1),
    )


@elementwise("Sigmoid", {"aten::sigmoid": ()})
def sigmoid() -> Curve:
    return Curve(
        torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), "+-", (0.0,),
        left=(0, 0), right=(0, 1),
    )


@elementwise("LogSigmoid", {"aten::log_sigmoid": ()})
def log_sigmoid() -> Curve:
    return Curve(
        F.logsigmoid, lambda x: torch.sigmoid(-x), "-", left=(1, 0), right=(0, 0),
    )


@elementwise("Erf", {"aten::erf": ()})
def erf() -> Curve:
    return Curve(
        torch.erf, lambda x: torch.exp(-x.clamp(-1e3, 1e3).square()) * (2 / math.sqrt(math.pi)),
        "+-", (0.0,), left=(0, -1), right=(0, 1),
    )


@elementwise("Softsign")
def softsign() -> Curve:
    return Curve(
        lambda x: torch.where(x.isinf(), x.sign(), F.softsign(x)),
        lambda x: (1 + x.abs()).square().reciprocal(), "+-", (0.0,), left=(0, -1), right=(0, 1),
        forward=F.softsign,
    )


@elementwise("Arctan", {"aten::atan": ()})
def arctan() -> Curve:
    return Curve(
        torch.atan, lambda x: (1 + x * x).reciprocal(), "+-", (0.0,),
        left=(0, -math.pi / 2), right=(0, math.pi / 2),
    )


@elementwise("Softplus", {"aten::softplus": ("beta", "threshold")})
def softplus(beta: float = 1.0, threshold: float = 20.0) -> Curve:
    """Right of threshold / beta it is x, which is less by log(1 + e^-threshold) / beta: a jump."""
    if beta <= 0:
        raise UserError(f"softplus with beta {beta:g}: beta must be positive")
    return Curve(
        lambda x: F.softplus(x, beta, threshold),
        lambda x: torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta)),
        "+0", (threshold / beta,), left=(0, 0), right=(1, 0), grain=min(1.0, 1 / beta),
    )


# ------------------------------------------------------------------------- exponential, powers


@elementwise("Exp", {"aten::exp": ()})
def exp() -> Curve:
    """A tangent at t is negative left of t - 1."""
    return Curve(torch.exp, torch.exp, left=(0, 0), reach=1.0)


@elementwise("Expm1", {"aten::expm1": ()})
def expm1() -> Curve:
    return Curve(torch.expm1, torch.exp, left=(0, -1), reach=1.0)


@elementwise("Exponential")
def exponential(base: float) -> Curve:
    """base ** x."""
    if not 0 < base < INF or base == 1:
        raise UserError(f"{base:g} ** x: the base must be positive and not 1")
    rate = math.log(base)
    flat, steep = (0.0, 0.0), (math.copysign(INF, rate), math.nan)

    def value(x: torch.Tensor) -> torch.Tensor:
        return torch.pow(base, x.double()).to(x.dtype)  # base is no float32 number

    return Curve(
        value, lambda x: value(x) * rate, forward=lambda x: torch.pow(base, x),
        left=flat if rate > 0 else steep, right=steep if rate > 0 else flat,
        grain=min(1.0, 1 / abs(rate)), reach=1 / rate,
    )


def _logarithm(value: Callable[[torch.Tensor], torch.Tensor], base: float, shift: float) -> Curve:
    return Curve(
        value, lambda x: ((x + shift) * math.log(base)).reciprocal(), "-", right=(0, INF),
        domain=(-shift, INF), grain=0.0,
    )


elementwise("Log", {"aten::log": ()})(lambda: _logarithm(torch.log, math.e, 0.0))
elementwise("Log2", {"aten::log2": ()})(lambda: _logarithm(torch.log2, 2.0, 0.0))
elementwise("Log10", {"aten::log10": ()})(lambda: _logarithm(torch.log10, 10.0, 0.0))
elementwise("Log1p", {"aten::log1p": ()})(lambda: _logarithm(torch.log1p, math.e, 1.0))


@elementwise("Sqrt", {"aten::sqrt": ()})
def sqrt() -> Curve:
    return Curve(
        torch.sqrt, lambda x: 0.5 * torch.rsqrt(x), "-", right=(0, INF), domain=(0.0, INF),
        grain=0.0, steep=True,
    )


@elementwise("Rsqrt", {"aten::rsqrt": ()})
def rsqrt() -> Curve:
    return Curve(
        torch.rsqrt, lambda x: -0.5 * torch.rsqrt(x).pow(3), right=(0, 0), domain=(0.0, INF),
        grain=0.0,
    )


@elementwise("Power", {"aten::square": {"exponent": 2.0}, "aten::reciprocal": {"exponent": -1.0}})
def power(exponent: float) -> Curve:
    """x ** n. Odd n: concave left of 0 and convex right of it; even n: convex. n < 0: a pole at 0.

    Without a whole n: on x >= 0 alone.
    """
    n = exponent
    if n in (0.0, 1.0):
        slope = _one if n else torch.zeros_like
        k, b = (1.0, 0.0) if n else (0.0, 1.0)
        return Curve(lambda x: x.pow(n), slope, "0", left=(k, b), right=(k, b))
    if n == 0.5:
        return sqrt()
    whole = float(n).is_integer()
    end = (INF, math.nan) if n > 1 else (0.0, INF if n > 0 else 0.0)
    bend = "-" if 0 < n < 1 else "+"

    if not whole:
        return Curve(  # in float64, as n may be no float32 number
            lambda x: x.double().pow(n).to(x.dtype),
            lambda x: (n * x.double().pow(n - 1)).to(x.dtype), bend, right=end,
            domain=(0.0, INF), grain=0.0, steep=0 < n < 2, forward=lambda x: x.pow(n),
        )

    def slope(x: torch.Tensor) -> torch.Tensor:
        return n * x.pow(n - 1)

    odd = n % 2 == 1
    pole = 0.0 if n < 0 else None
    if not odd and pole is None:
        return Curve(lambda x: x.pow(n), slope, left=(-INF, math.nan), right=end, grain=0.0)
    left = ((INF, math.nan) if odd else (-INF, math.nan)) if n > 0 else (0.0, 0.0)
    bends = "-+" if odd else "++"
    return Curve(
        (lambda x: x.reciprocal()) if n == -1 else (lambda x: x.pow(n)), slope, bends, (0.0,),
        left=left, right=end, pole=pole, grain=0.0,
    )


elementwise("Sin", {"aten::sin": ()})(lambda: Sine(torch.sin, torch.cos, shift=0.0))
elementwise("Cos", {"aten::cos": ()})(
    lambda: Sine(torch.cos, lambda x: -torch.sin(x), shift=math.pi / 2)
)


# -------------------------------------------------------------- with corners, and with two halves


def bent(left: float, right: float, value: Callable[[torch.Tensor], torch.Tensor]) -> Curve:
    """`left` x for x < 0, `right` x for x > 0."""
    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x < 0, torch.full_like(x, left), right)

    return Curve(value, slope, "00", (0.0,), left=(left, 0), right=(right, 0), grain=0.0)


elementwise("Abs", {"aten::abs": ()})(lambda: bent(-1.0, 1.0, torch.abs))


@elementwise("LeakyRelu", {"aten::leaky_relu": ("negative_slope",)})
def leaky_relu(negative_slope: float = 0.01) -> Curve:
    return bent(negative_slope, 1.0, lambda x: F.leaky_relu(x, negative_slope))


@elementwise("Sign", {"aten::sign": ()})
def sign() -> Curve:
    return Curve(torch.sign, torch.zeros_like, "00", (0.0,), left=(0, -1), right=(0, 1), grain=0.0)


@elementwise("Threshold", {"aten::threshold": ("threshold", "value")})
def threshold(threshold: float, value: float) -> Curve:
    """x right of the threshold, `value` elsewhere."""
    return Curve(
        lambda x: F.threshold(x, threshold, value), lambda x: (x > threshold).to(x.dtype),
        "00", (threshold,), left=(0, value), right=(1, 0), grain=0.0,
    )


_BOTH = ("least", "most")


@elementwise("Clamp", {
    "aten::clamp": _BOTH, "aten::hardtanh": _BOTH, "aten::relu6": {"least": 0.0, "most": 6.0},
    "aten::clamp_min": ("least",), "aten::clamp_max": ("most",),
})
def clamp(least: float = -INF, most: float = INF) -> Curve:
    """min(max(x, least), most): hardtanh, ReLU6."""
    least = min(least, most)  # as torch has it
    breaks = tuple(x for x in sorted({least, most}) if math.isfinite(x))
    low, high = math.isfinite(least), math.isfinite(most)
    return Curve(
        lambda x: x.clamp(least, most),
        lambda x: ((x >= least) & (x <= most)).to(x.dtype), "0" * (len(breaks) + 1), breaks,
        left=(0, least) if low else (1, 0), right=(0, most) if high else (1, 0), grain=0.0,
    )


@elementwise("HardSigmoid", {"aten::hardsigmoid": ()})
def hardsigmoid() -> Curve:
    """min(max(x / 6 + 1/2, 0), 1)."""
    return Curve(
        F.hardsigmoid, lambda x: (x.abs() <= 3).to(x.dtype) / 6, "000", (-3.0, 3.0),
        left=(0, 0), right=(0, 1),
    )


@elementwise("HardSwish", {"aten::hardswish": ()})
def hardswish() -> Curve:
    """x min(max(x / 6 + 1/2, 0), 1)."""
    return Curve(
        F.hardswish,
        lambda x: torch.where(x.abs() <= 3, x / 3 + 0.5, (x > 0).to(x.dtype)),
        "0+0", (-3.0, 3.0), left=(0, 0), right=(1, 0),
    )


_SELU = {"alpha": 1.6732632423543772, "scale": 1.0507009873554805, "input_scale": 1.0}


@elementwise("Elu", {"aten::elu": ("alpha", "scale", "input_scale"), "aten::selu": _SELU})
def elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Curve:
    """scale x for x > 0, scale alpha (e^(input_scale x) - 1) else: ELU, SELU, CELU."""
    if not (alpha > 0 and scale > 0 and input_scale > 0):
        raise UserError(
            f"ELU with alpha {alpha:g}, scale {scale:g}, input_scale {input_scale:g}: "
            "they must be positive"
        )
    height, steep = scale * alpha, scale * alpha * input_scale
    return Curve(
        lambda x: torch.ops.aten.elu(x, alpha, scale, input_scale),
        lambda x: torch.where(x > 0, scale, steep * (x.clamp(max=0) * input_scale).exp()),
        "+" if steep == scale else "+0", () if steep == scale else (0.0,),
        left=(0, -height), right=(scale, 0), grain=min(1.0, 1 / input_scale),
    )


@elementwise("Celu", {"aten::celu": ("alpha",)})
def celu(alpha: float = 1.0) -> Curve:
    """max(x, 0) + min(alpha (e^(x / alpha) - 1), 0): smooth, and convex."""
    if alpha <= 0:
        raise UserError(f"CELU with alpha {alpha:g}: alpha must be positive")
    return Curve(
        lambda x: F.celu(x, alpha), lambda x: (x.clamp(max=0) / alpha).exp(),
        left=(0, -alpha), right=(1, 0), grain=min(1.0, alpha),
    )
