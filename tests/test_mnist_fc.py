"""VNN-COMP 2022's mnist_fc, all 90 instances: the published networks and properties."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from ranks import pool

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "vnncomp2022_mnist_fc"
NETWORKS = ("256x2", "256x4", "256x6")
PROVED = {
    ("256x2", 0.03): 9, ("256x2", 0.05): 1,
    ("256x4", 0.03): 10, ("256x4", 0.05): 0,
    ("256x6", 0.03): 9, ("256x6", 0.05): 0,
}
"""Of 15 properties each, by CROWN; measured with auto_LiRPA 0.7.1, dense, float32."""

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the VNN-COMP data (../shared/data) is not beside this clone"
)


@cache
def _properties(eps):
    from lirpa_megatron.verify.properties.vnnlib import read_vnnlib

    names = [f"prop_{i}_{eps:.2f}.vnnlib" for i in range(15)]
    return [read_vnnlib(DATA / "vnnlib" / f"{name}.gz") for name in names]


def _batch(eps, dtype):
    """All properties of one radius as one batch: x_L, x_U [15, 784], C [15, 9, 10]."""
    from lirpa_megatron.verify.properties.specification import outward_box, specification_matrix

    boxes, C = [], []
    for prop in _properties(eps):
        (region,) = prop.regions
        assert all(row.bound == 0 for row in prop.rows) and len(prop.rows) == 9
        assert region.disjuncts == tuple((i,) for i in range(9)), "any other label wins"
        boxes.append(outward_box(region, dtype))
        C.append(specification_matrix(prop.rows, 10, dtype))
    lower, upper = (torch.cat(part) for part in zip(*boxes, strict=True))
    return lower, upper, torch.cat(C)


def _lower_bounds(dtype):
    """(network, eps) -> lower bounds [15, 9] of the output rows, and the rows' clean values."""
    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, parallelize
    from lirpa_megatron.networks.network import Network
    from lirpa_megatron.networks.onnx_import import read_onnx

    bounds = {}
    for name in NETWORKS:
        imported = read_onnx(DATA / "onnx" / f"mnist-net_{name}.onnx.gz")
        network = Network.from_weights(imported.description, imported.weights)
        model = parallelize(network.to(dtype)).requires_grad_(False)
        bounded = None
        for eps in (0.03, 0.05):
            lower, upper, C = _batch(eps, dtype)
            bounded = bounded or BoundedModule(model, lower)
            box = BoundedTensor(
                (lower + upper) / 2, PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
            )
            result = bounded.compute_bounds(x=(box,), C=C, method="CROWN", bound_upper=False)
            clean = torch.einsum("bsn,bn->bs", C, bounded((lower + upper) / 2))
            bounds[name, eps] = torch.stack((result[0], clean)).detach()
    return bounds


@cache
def _at(size, dtype):
    results = pool(size).run(_lower_bounds, dtype)
    for other in results[1:]:
        assert all(torch.equal(other[key], results[0][key]) for key in other)
    return results[0]


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_crown_proves_the_published_numbers_of_properties(size):
    bounds = _at(size, torch.float32)
    proved = {key: int((lower > 0).all(1).sum()) for key, (lower, _) in bounds.items()}
    assert proved == PROVED


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5),  # sums of up to 784 terms in another order
    pytest.param(torch.float64, 1e-10, marks=pytest.mark.slow),
])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_lower_bounds_agree_between_tensor_parallel_sizes(size, dtype, tolerance):
    one, many = _at(1, dtype), _at(size, dtype)
    for key, (lower, clean) in one.items():
        # Of the magnitude of what is bounded: a bound that comes out near zero (256x6, property 2)
        # is a difference of terms of the size of the clean margin, which float32 rounds.
        scale = torch.max(lower.abs(), clean.abs()).amax(1, keepdim=True)
        assert ((many[key][0] - lower).abs() / scale).max() <= tolerance, key
