"""Models cut into pipeline stages: each rank builds its own, of the same whole model everywhere."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    at_position,
    bert_head,
    parallelize,
)
from lirpa_megatron.adapters.stages import PipelineStage

LAYERS = 4
"""Of the transformers, so that four stages have one each."""
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def place():
    """(stage, stages) of this rank."""
    from megatron.core import parallel_state

    return (parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_world_size())


def mlp(cuts=(), activation="relu", layers=6, width=16, dtype=torch.float64):
    """Linear layers with activations between them; this rank's part, from one cut to the next.

    Args:
        cuts: indices of layers and activations at which a stage begins; none: the whole.
        activation: of `ACTIVATIONS`.
        layers: how many linear ones.
        width: of hidden layers.
        dtype: of the parameters.
    """
    generator = torch.Generator().manual_seed(0)
    widths, parts = [5, *[width] * (layers - 1), 4], []
    for i in range(layers):
        layer = nn.Linear(widths[i], widths[i + 1], dtype=dtype)
        for value in layer.parameters():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.data = (0.9 / widths[i] ** 0.5 * drawn).to(dtype)
        parts += [layer, ACTIVATIONS[activation]()]
    model = nn.Sequential(*parts[:-1]).eval()
    if not cuts:
        return parallelize(model)
    stage, _ = place()
    ends = [0, *cuts, len(model)]
    return PipelineStage(parallelize(model[ends[stage] : ends[stage + 1]]))


def transformer(kind, dtype=torch.float64, **flags):
    """This rank's stage of `transformers.KIND`, LAYERS layers in all; all of it without stages."""
    stage, stages = place()
    flags = {"num_layers": LAYERS, **flags}
    build = getattr(transformers, kind)
    whole = build(dtype, **flags)
    if stages == 1:
        return whole
    ends = {"pre_process": stage == 0, "post_process": stage == stages - 1}
    part = build(dtype, model=ends, pipeline_model_parallel_size=stages, pipeline_dtype=dtype,
                 **flags)
    before = stage * flags["num_layers"] // stages
    values = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            head, _, rest = name.partition(".layers.")
            if rest:
                index, _, rest = rest.partition(".")
                name = f"{head}.layers.{int(index) + before}.{rest}"
            if name == "output_layer.weight" and name not in values:  # tied
                name = "embedding.word_embeddings.weight"
            parameter.copy_(values[name])
    return part


def view_of(kind, model):
    """What is bounded of a transformer."""
    return bert_head(model, "binary") if kind == "bert" else at_position(model, -1)


def hidden(dtype=torch.float64, batch=2):
    """What enters the first layer, [B, S, h]."""
    generator = torch.Generator().manual_seed(11)
    shape = (batch, transformers.LENGTH, transformers.HIDDEN)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def perturbed(x, eps, norm=float("inf"), first_only=False):
    """x with a set around it."""
    if first_only:
        radii = torch.zeros_like(x)
        radii[:, 1] = eps
        return BoundedTensor(x, PerturbationLpNorm(norm=norm, x_L=x - radii, x_U=x + radii))
    return BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps))


def mlp_bounds(cuts, activation, methods, dtype=torch.float64, options=None, eps=0.1, norm=None):
    """method -> [(lower, upper) of the output, of a specification]."""
    torch.set_default_dtype(dtype)
    model = mlp(cuts, activation, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, generator=generator, dtype=torch.float64).to(dtype)
    C = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
    bounded = BoundedModule(model, x, options)
    found = {}
    for method in methods:
        for specification in (None, C):
            bounds = bounded.compute_bounds(
                (perturbed(x, eps, norm or float("inf")),), C=specification, method=method
            )
            found[method, specification is None] = [b.detach().numpy() for b in bounds]
    return found


def transformer_bounds(
    kind, methods, dtype=torch.float64, eps=0.01, options=None, norm=float("inf"), **flags
):
    """method -> (lower, upper)."""
    torch.set_default_dtype(dtype)
    view = view_of(kind, transformer(kind, dtype, **flags))
    x = hidden(dtype)
    bounded = BoundedModule(view, (x,), options)
    found = {}
    for method in methods:
        bounds = bounded.compute_bounds((perturbed(x, eps, norm),), method=method)
        found[method] = [b.detach().numpy() for b in bounds]
    return found
