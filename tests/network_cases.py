"""Calls of `compute_bounds` on sharded networks, and plain auto_LiRPA's bounds for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from models import (
    AS_PLAIN,
    HOSTS_OWN,
    Net,
    Plain,
    build,
    plain,
    plain_compute,
    region,
    relative_error,
    specification,
)
from ranks import pool

from lirpa_megatron import BoundedModule, parallelize
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.tuning import Tuning

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
BATCH, ROWS = 3, 5

NETS = {
    "relu": Net(hidden=(16, 12, 8)),
    "mixed": Net(acts=("relu", "tanh", "sigmoid"), hidden=(12, 16)),
    "residual": Net(inputs=8, hidden=(12, 16, 12), residual=True, acts=("relu", "relu", "tanh")),
    "skip of a sharded value": Net(skip_hidden=True, acts=("relu", "tanh")),
    "skip over a pair": Net(long_skip=True, hidden=(12, 12)),
    "no bias": Net(bias=False),
    "widths that do not divide": Net(hidden=(10, 12, 7)),
    "constants between shards": Net(constants=True, acts=("relu", "sigmoid")),
    "an activation reads the input": Net(act_first=True),
    "stable neurons": Net(hidden=(16, 12, 16), bias_scale=2.0),
}
IN_TURNS = Tuning(turn={"cpu": 1})
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "chunks": {"max_spec_rows": 3},
    "little memory": {"pass_memory": 1e-3},
    "own rows": {"final_rows": "own"},
    "own rows in chunks": {"final_rows": "own", "max_spec_rows": 1},
    "A moves": {"final_rows": "own", "moves": "A"},
    "weights move": {"final_rows": "own", "moves": "weights"},
    "weights move, in chunks": {"final_rows": "own", "moves": "weights", "max_spec_rows": 2},
    "every neuron": {"sparse_intermediate_bounds": False},
    "alpha of some rows": {"sparse_spec_alpha": True},
    "own rows in turns": {"final_rows": "own", "tuning": IN_TURNS},
    "A moves, in turns": {"final_rows": "own", "moves": "A", "tuning": IN_TURNS},
}


# Adam divides gradients by their size, so that an entry of alpha whose true gradient is 0 moves by
# rounding noise, on one device as on several: chunks alone change a bound by 4e-6 after 20 steps of
# it. Gradient descent adds the noise as it is. So it is what networks in general are compared with,
# and Adam, auto_LiRPA's default, on a network where no such entry arises.
ITERATIONS = {"sgd": 3, "adam": 20}


@dataclass(frozen=True)
class Case:
    """One call of `compute_bounds`."""

    method: str = "CROWN"
    C: bool = False
    options: str = "default"
    where: str = "linf"
    optimizer: str = "sgd"
    """Of alpha; see `ITERATIONS`."""
    kwargs: tuple = field(default=())
    given: str = ""
    """'interm_bounds' or 'reference_bounds', made from the bounds of a first CROWN."""


def inner_nodes(module: Any) -> list[Any]:
    """Perturbed operators with bounds, in the order in which the model computes them."""
    return [n for n in module._modules.values() if n.inputs and n.perturbed
            and all(isinstance(getattr(n, b, None), torch.Tensor) for b in ("lower", "upper"))]


def given_bounds(case: Case, module: Any) -> dict[str, Any]:
    """Intermediate bounds that change the result: looser (fixed) or tighter (intersected).

    Not of the first layer, where 0.3 looks at no reference bounds.
    """
    bounds = {}
    for node in inner_nodes(module)[1:]:
        if node.name == module.final_name:
            continue
        width = node.upper - node.lower
        change = -0.1 * width if case.given == "interm_bounds" else 0.1 * width
        bounds[node.name] = (node.lower + change, node.upper - change)
    return {case.given: bounds}


def compute(module: Any, run: Any, net: Net, case: Case, dtype: torch.dtype) -> Any:
    """The bounds of one case through `run(x, C, **kwargs)`."""
    where = region(net, case.where, batch=BATCH, dtype=dtype)
    C = specification(BATCH, ROWS, net.outputs, dtype) if case.C else None
    kwargs = dict(case.kwargs)
    if case.given:
        run(where.bounded(), C, "CROWN")
        kwargs |= given_bounds(case, module)
    return run(where.bounded(), C, case.method, **kwargs)


def alpha_args(optimizer: str) -> dict[str, Any]:
    return {"iteration": ITERATIONS[optimizer], "optimizer": optimizer}


def sharded_bounds(net: Net, cases: list[Case], dtype: torch.dtype, inner: bool = False) -> list:
    """On each rank: (lower, upper) of each case, or the inner nodes' (sharded, lower, upper)."""
    torch.set_default_dtype(dtype)  # auto_LiRPA needs it
    model = parallelize(build(net, dtype).eval())
    modules: dict[Any, BoundedModule] = {}
    results = []
    for case in cases:
        key = case.options, case.optimizer
        if key not in modules:
            options = {**AS_PLAIN, **OPTIONS[case.options]}
            options["optimize_bound_args"] = alpha_args(case.optimizer)
            x = region(net, batch=BATCH).center.to(dtype)
            modules[key] = BoundedModule(model, x, options, custom_ops=HOSTS_OWN)
        module = modules[key]

        def run(x: Any, C: Any, method: str, module: Any = module, **kwargs: Any) -> Any:
            return module.compute_bounds(x=(x,), C=C, method=method, **kwargs)

        bounds = compute(module, run, net, case, dtype)
        if inner:
            results.append([(module.sharded[n.name], n.lower.numpy(), n.upper.numpy())
                            for n in inner_nodes(module)])
        else:
            results.append([None if b is None else b.detach().numpy() for b in bounds])
    return results


@cache
def plain_module(
    net: Net, dtype: torch.dtype, optimizer: str, sparse: bool, method: str
) -> Plain:
    """One for each method: after CROWN-Optimized 0.3 would bound all rows in other methods too."""
    x = region(net, batch=BATCH, dtype=dtype).center
    return plain(build(net, dtype).eval(), x, optimize_bound_args=alpha_args(optimizer),
                 sparse_intermediate_bounds=sparse)


@cache
def plain_bounds(net: Net, case: Case, dtype: torch.dtype) -> tuple:
    """(lower, upper) of plain auto_LiRPA; the case's options are not its own."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        sparse = case.options != "every neuron"
        module = plain_module(net, dtype, case.optimizer, sparse, case.method)

        def run(x: Any, C: Any, method: str, **kwargs: Any) -> Any:
            return plain_compute(module, x, C, method, **kwargs)

        bounds = compute(module, run, net, case, dtype)
        inner = [(n.lower.detach(), n.upper.detach()) for n in inner_nodes(module)]
        return tuple(None if b is None else b.detach() for b in bounds), inner
    finally:
        torch.set_default_dtype(old)


def float64(function: Any, *args: Any) -> Any:
    """The result with float64 as torch's default, as auto_LiRPA needs it."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return function(*args)
    finally:
        torch.set_default_dtype(old)


def without_options(case: Case) -> Case:
    """The case for plain auto_LiRPA, which has one of the options alone."""
    return case if case.options == "every neuron" else replace(case, options="default")


def compare(net: Net, cases: list[Case], tp: int, dtype: torch.dtype = torch.float64) -> None:
    results = pool(tp).run(sharded_bounds, net, cases, dtype)
    for i, case in enumerate(cases):
        want, _ = plain_bounds(net, without_options(case), dtype)
        both = replace(without_options(case), kwargs=())
        lower, upper = plain_bounds(net, both, dtype)[0]
        for rank, result in enumerate(results):
            got = [None if b is None else torch.from_numpy(b) for b in result[i]]
            error = relative_error(got, want, upper - lower)
            assert error <= TOLERANCE[dtype], (rank, case, error)


def is_available(net: Net, case: Case) -> bool:
    """auto_LiRPA 0.3 cannot merge C into a last layer without a bias, in IBP."""
    return net.bias or not auto_lirpa.IS_03 or not case.C or case.method not in ("IBP", "CROWN-IBP")
