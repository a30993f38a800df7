"""A gives the bounds of its rows; alpha is a rank's own where the neuron is, else equal on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import HOSTS_OWN, Net, build, region, relative_error, specification
from network_cases import BATCH, NETS, ROWS, inner_nodes
from ranks import pool

from lirpa_megatron import BoundedModule, parallelize
from lirpa_megatron.compat import auto_lirpa


def coefficients(net: Net, options: dict[str, Any]) -> tuple:
    """Each rank's A of a final pass, a sharded and a replicated inner node, and their bounds."""
    torch.set_default_dtype(torch.float64)
    where = region(net, batch=BATCH)
    module = BoundedModule(
        parallelize(build(net).eval()), where.center, options, custom_ops=HOSTS_OWN
    )
    # Known after a first pass: the second layer inside a pair, and the first between two.
    module.compute_bounds(x=(where.bounded(),), method="CROWN")
    inner = [n for n in inner_nodes(module) if isinstance(n, auto_lirpa.BoundLinear)]
    starts = [module[module.final_name], inner[1], inner[2]]
    needed = {start.name: list(module.input_name) for start in starts}
    C = specification(BATCH, ROWS, net.outputs)
    *bounds, A = module.compute_bounds(
        x=(where.bounded(),), C=C, method="CROWN", return_A=True, needed_A_dict=needed
    )
    results = []
    for start in starts:
        entry = A[start.name][module.input_name[0]]
        start_bounds = bounds if start is starts[0] else (start.lower, start.upper)
        results.append((
            module.sharded[start.name], [b.detach().numpy() for b in start_bounds],
            [entry[name].detach().numpy() for name in ("lA", "uA", "lbias", "ubias")],
        ))
    return tuple(results)


@pytest.mark.parametrize("tp", [2, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (1, 4))])
@pytest.mark.parametrize("rows", ["whole", "own"])
def test_the_coefficients_give_the_bounds_of_their_rows(rows, tp):
    net = NETS["relu"]
    options = {"return_A_rows": rows, "final_rows": rows, "max_spec_rows": 2}
    where = region(net, batch=BATCH)
    by_start = zip(*pool(tp).run(coefficients, net, options), strict=True)
    for of_ranks in by_start:
        sharded = of_ranks[0][0]
        bounds = [[torch.from_numpy(b) for b in rank[1]] for rank in of_ranks]
        A = [[torch.from_numpy(a) for a in rank[2]] for rank in of_ranks]
        whole_bounds = [torch.cat(b, 1) if sharded else b[0] for b in zip(*bounds, strict=True)]
        count = whole_bounds[0].shape[1]
        if rows == "own":
            assert all(a.shape[1] == -(-count // tp) for rank in A for a in rank)
            whole = [torch.cat(parts, 1)[:, :count] for parts in zip(*A, strict=True)]
        else:
            assert all(a.equal(b) for rank in A for a, b in zip(rank, A[0], strict=True))
            whole = A[0]
        lA, uA, lbias, ubias = whole
        assert lA.shape == (BATCH, count, net.inputs)
        got = [
            torch.einsum("bsi,bi->bs", a, where.center) + sign * where.eps * a.abs().sum(-1) + bias
            for a, bias, sign in ((lA, lbias, -1), (uA, ubias, +1))
        ]
        assert relative_error(got, whole_bounds, whole_bounds[1] - whole_bounds[0]) <= 1e-10


def alphas(net: Net, shared: bool) -> dict:
    """(activation, start node) by position -> (sharded, alpha) after a few steps on each rank."""
    torch.set_default_dtype(torch.float64)
    where = region(net, batch=BATCH)
    options = {"optimize_bound_args": {"iteration": 4, "use_shared_alpha": shared}}
    module = BoundedModule(
        parallelize(build(net).eval()), where.center, options, custom_ops=HOSTS_OWN
    )
    C = specification(BATCH, ROWS, net.outputs)
    module.compute_bounds(x=(where.bounded(),), C=C, method="CROWN-Optimized")
    order = list(module._modules)
    return {
        (order.index(node.name), order.index(start), start == module.final_name):
            (module.sharded[node.name], node.output_shape[-1], alpha.detach().numpy())
        for node in module._modules.values()
        if isinstance(node, auto_lirpa.BoundOptimizableActivation)
        for start, alpha in node.alpha.items()
    }


@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_alpha_is_bitwise_equal_where_replicated_and_sharded_where_the_neuron_is(shared):
    first, other = pool(2).run(alphas, NETS["residual"], shared)
    assert first.keys() == other.keys()
    kinds = set()
    for key, (sharded, features, alpha) in first.items():
        theirs = other[key][2]
        assert alpha.shape[-1] == features == theirs.shape[-1]
        assert alpha.min() < alpha.max()  # it moved
        kinds.add((sharded, key[2]))
        if not sharded and (key[2] or shared):  # a whole pass, or one alpha for all rows
            assert (alpha == theirs).all(), key
    assert kinds == {(s, f) for s in (False, True) for f in (False, True)}
