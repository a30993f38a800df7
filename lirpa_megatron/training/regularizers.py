"""Initialisation and warm-up of certified training, after Shi et al. (NeurIPS 2021).

"Fast Certified Robust Training with Short Warmup", arXiv 2103.17268. They are for networks that are
trained with IBP (or CROWN-IBP) from scratch; a model that is fine-tuned needs neither.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lirpa_megatron.adapters.linear_facades import is_column, is_row
from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.parallel import runtime


def ibp_initialization(model: nn.Module, seed: int = 0) -> None:
    """Draws weights with which IBP's intervals neither grow nor shrink from layer to layer.

    Through W with entries of N(0, s^2) the width of an interval grows by the factor
    n E|W_ij| / 2 (half of it is cut off by ReLU), n the inputs; it is 1 for s = sqrt(2 pi) / n.
    Biases become 0. Applies to nn.Linear and to column- and row-parallel layers that have a weight
    of their own, n the inputs of the whole layer; the whole weight is drawn and cut, so that the
    network is the same at every tensor-parallel size (but for gated layers, whose ranks have parts
    of both halves).

    Args:
        model: changed in place; all ranks call this.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not (is_column(module) or is_row(module) or type(module) is nn.Linear):
            continue
        weight, size, rank = module.weight, 1, 0
        if weight is None:  # an output layer that uses the word embeddings
            continue
        shape, dim = list(weight.shape), 1 if is_row(module) else 0
        if type(module) is not nn.Linear:
            group = getattr(module, "tp_group", None) or runtime.tp_group()
            size, rank = (1, 0) if group is None else (group.size(), group.rank())
            shape[dim] *= size
        whole = torch.randn(shape, generator=generator) * math.sqrt(2 * math.pi) / shape[1]
        with torch.no_grad():
            weight.copy_(whole.chunk(size, dim)[rank])
            if module.bias is not None:
                module.bias.zero_()


def bound_regularizer(bounded: BoundedModule, tolerance: float = 0.5) -> torch.Tensor:
    """Penalties on intervals that grow and on ReLUs that are mostly on one side, for the warm-up.

    Of the m activations' inputs with intervals [l, u], D = (u - l)/2 and
    c = (u + l)/2, means E over features and batch, D_0 that of the input:

        tightness  1/(t m) sum relu(t - E D_0 / E D_i)
        balance    1/(t m) sum relu(t - min(r, 1/r)) for two ratios r of the ReLUs that are always
                   on and always off: of their sums |sum c|, and of their sums (c - E c)^2

    A ratio is left out where no ReLU is always on, or none always off. The paper multiplies the
    sum by 0.5 (1 - eps / eps_max), which ends the warm-up.

    Args:
        bounded: after `compute_bounds` with method IBP or CROWN-IBP.
        tolerance: t.

    Returns:
        a number, the same on every rank; gradients flow to the parameters.
    """
    tp, total, count = bounded.context.collectives, None, 0
    first = torch.stack([D.mean() for D in _input_widths(bounded)]).mean()
    for node in bounded.named_nodes().values():
        activations = (auto_lirpa.BoundActivation, auto_lirpa.BoundOptimizableActivation)
        if not isinstance(node, activations):
            continue
        x = node.inputs[0]
        known = auto_lirpa.known_bounds(x)
        if known is None or not x.perturbed:
            continue
        lower, upper = known
        sharded = bounded.sharded[x.name] and tp.size > 1
        ranks = tp.size if sharded else 1

        def summed(values: torch.Tensor, sharded: bool = sharded) -> torch.Tensor:
            return tp.reduce_from(values) if sharded else values

        center, size = (lower + upper) / 2, lower.numel() * ranks
        width, mean = (summed(torch.stack([(upper - lower).sum() / 2, center.sum()])) / size)
        # Means over batch and features alike: every rank has the whole batch of its replica.
        terms = F.relu(tolerance - first / width.clamp(min=1e-12))
        if isinstance(node, auto_lirpa.BoundRelu):
            on, off = lower > 0, upper < 0
            spread = (center - mean) ** 2
            sums = summed(torch.stack(
                [(center * on).sum(), -(center * off).sum(), (spread * on).sum(),
                 (spread * off).sum()]
            ))
            terms = terms + _unbalance(sums[0], sums[1], tolerance)
            terms = terms + _unbalance(sums[2], sums[3], tolerance)
        total, count = terms if total is None else total + terms, count + 1
    if total is None:
        return first * 0
    return total / (tolerance * count)


def _unbalance(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> torch.Tensor:
    defined = (a > 0) & (b > 0)
    a, b = torch.where(defined, a, 1.0), torch.where(defined, b, 1.0)
    return F.relu(tolerance - torch.minimum(a / b, b / a))


def _input_widths(bounded: BoundedModule) -> list[torch.Tensor]:
    """Half the widths of the perturbed inputs."""
    known = [auto_lirpa.known_bounds(node) for node in auto_lirpa.perturbed_inputs(bounded)]
    return [(pair[1] - pair[0]) / 2 for pair in known if pair is not None]
