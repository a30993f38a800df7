"""Token ids and what may happen to them, as the perturbed input of a bounded language model.

Ids are discrete; bounded are the hidden states that the embedding, or the first layers, make of
them. The ids stay what the user gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.bert.bert_model import BertModel
from torch import nn

from lirpa_megatron.adapters import hooks
from lirpa_megatron.adapters.embeddings import embed, off_sums
from lirpa_megatron.adapters.live.entering import check_entering
from lirpa_megatron.adapters.stages import pipeline_of
from lirpa_megatron.adapters.traceable import traceable
from lirpa_megatron.adapters.views import LANGUAGE_MODELS, View
from lirpa_megatron.arithmetic.floating import box_around, widened
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.parameters import HALF
from lirpa_megatron.problem.directions import directions as along
from lirpa_megatron.problem.perturbations import PerturbationHull, PerturbationPositions

Substitutes = Mapping[int, Sequence[int]]


def perturb_tokens(
    model: nn.Module,
    ids: torch.Tensor,
    *,
    eps: float | torch.Tensor | None = None,
    norm: float = math.inf,
    positions: Iterable[int] | None = None,
    substitutes: Substitutes | Sequence[Substitutes] | None = None,
    directions: torch.Tensor | Sequence[torch.Tensor] | None = None,
    shape: str = "box",
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    tokentype_ids: torch.Tensor | None = None,
    start_layer: int | None = None,
    check_live: bool = True,
    rounding: str = "nearest",
) -> tuple[torch.Tensor, ...]:
    """Makes the inputs of `BoundedModule(model, inputs)` and `compute_bounds(inputs)` from tokens.

    Either each embedding may change by up to `eps`, or words may be replaced by `substitutes`, or
    (with shape 'box') both; or hidden states move along `directions` alone. Every
    rank calls it with the same arguments.

    In training mode of the model gradients flow to the parameters of the embedding (and of the
    layers before `start_layer`), in eval mode the result is constant.

    Args:
        model: a GPTModel, HybridModel or BertModel, or a view of one (`at_position`, ..., margins
            of tokens).
        ids: token ids [B, S].
        eps: radius at each position: a number, [S] or [B, S]; 0 leaves a position unperturbed.
        norm: inf, 2 or 1. With inf, each coordinate of an embedding changes by up to eps. With 2
            and 1, a number is the radius of one ball over all coordinates of all (chosen) positions
            of a sample; a tensor gives each position its own ball.
        positions: positions (0 to S-1, or negative from the end) that eps applies to; None: all.
        substitutes: position -> ids of the words that may replace the word there, for all samples;
            or a list of B such mappings. The set at a position contains the embeddings of its own
            word and of the substitutes, with position and token type added; positions are
            independent.
        directions: d vectors [h]: the hidden states at all (or the chosen) positions change by t_1
            D_1 + ... + t_d D_d, the same t at each; |t_i| is at most `eps`, a number or [d].
        shape: shape of the sets of substitutes: 'box', the smallest box that contains the
            embeddings, or 'hull', their convex hull, which is tighter.
        attention_mask: as Megatron's forward takes it: for a decoder [B or 1, 1, S, S], nonzero
            (True) where masked; for a BertModel the padding mask [B, S], 1 where kept.
        position_ids: [B, S], as for `embed`.
        tokentype_ids: [B, S], as for `embed`.
        start_layer: the layer (from 0) whose input is perturbed; earlier layers are computed at
            the clean ids, without gradients. By default the view's, or 0 for a model; use
            `from_layer` to bound the rest.
        check_live: whether to run the model's own embedding (and the layers before `start_layer`)
            and compare.
        rounding: "outward" (in float64, with BoundedModule's): the set holds that around the sums
            of the tables' numbers in real arithmetic. Boxes are rounded outwards and hold what a
            sum is off; balls and hulls are refused where one is off (`embeddings.off_sums`).

    Returns:
        (hidden,) or, with an attention mask, (hidden, mask): hidden [B, S, h] a BoundedTensor, mask
        [B, 1, S, S] numbers, 1 where masked.

    Raises:
        UserError: shapes that do not match; ids, positions or layers that do not exist; a radius
            below 0 or NaN; no perturbation, or two that cannot be combined.
        NotImplementedError: an embedding that differs from Megatron's, by name.
        LiveModelError: the model itself computes different hidden states from the ids.
    """
    _check_ids(ids)
    model, first = _opened(model, start_layer)
    mask = None if attention_mask is None else _mask(model, attention_mask, ids)
    words: dict[str, Any] = {"position_ids": position_ids, "tokentype_ids": tokentype_ids}
    for name, value in words.items():
        if value is not None and value.shape != ids.shape:
            raise UserError(f"{name} have shape {tuple(value.shape)}, the ids {tuple(ids.shape)}")
    if directions is not None:
        _check_directions(eps, norm, substitutes, rounding)
    if eps is None and substitutes is None:
        raise UserError("nothing is perturbed: give eps or substitutes")
    if shape not in ("box", "hull"):
        raise UserError(f"there is no shape {shape!r}: choose 'box' or 'hull'")
    if norm not in (math.inf, 2, 1):
        raise UserError(f"norm is {norm!r}: choose inf, 2 or 1")
    if eps is None and positions is not None:
        raise UserError("positions say where eps applies: give eps too, or substitutes alone")
    if substitutes is not None:
        _check_substitutes(substitutes, ids, shape, eps, norm, first)

    hidden = embed(model, ids, **words, check_live=check_live)
    if hidden.dtype in HALF:
        hidden = hidden.float()  # bounds are computed in float32
    if not model.training:
        hidden = hidden.detach()
    if mask is not None:
        mask = mask.to(hidden)
    outward = rounding == "outward"
    off = off_sums(model, ids, **words) if outward else None
    if outward and first > 0:
        raise UserError(
            f'rounding="outward" and layer {first}: what the layers before it compute is rounded; '
            "start at layer 0"
        )
    if first > 0:
        hidden = _enter(model, hidden, mask, first, check_live)
    if directions is not None:
        perturbation = along(hidden, directions, eps, positions).ptb
    elif substitutes is None:
        perturbation = _around(hidden, eps, norm, positions, off)
    else:
        vertices = _vertices(model, ids, substitutes, {**words, "check_live": check_live})
        vertices = vertices if model.training else vertices.detach()
        rest = None
        if outward:
            rest = _vertices(model, ids, substitutes, words, off_sums)
        if shape == "hull":
            if rest is not None:
                _check_exact(rest, "a hull")
            perturbation = PerturbationHull(vertices)
        else:
            low, high = vertices.amin(2), vertices.amax(2)
            if rest is not None:
                low, high = _wider(low, high, rest.amax(2))
            if eps is not None:
                radii = _radii(hidden, eps, positions).unsqueeze(-1)
                if outward:
                    low, high = box_around(low, radii)[0], box_around(high, radii)[1]
                else:
                    low, high = low - radii, high + radii
            perturbation = auto_lirpa.PerturbationLpNorm(norm=math.inf, x_L=low, x_U=high)
    # keeps the graph, unlike its constructor
    bounded = hidden.as_subclass(auto_lirpa.BoundedTensor)
    bounded.ptb = perturbation
    return (bounded,) if mask is None else (bounded, mask)


# ------------------------------------------------------------------------- the model


def check_start_layer(model: nn.Module, layer: int) -> None:
    """Raises UserError unless hidden states that enter the layer (from 0) can be perturbed."""
    _opened(model, layer)


def _opened(model: nn.Module, start_layer: int | None) -> tuple[nn.Module, int]:
    """(The language model, the layer where the hidden states enter)."""
    model = hooks.unwrapped(model)
    if isinstance(model, View):
        if start_layer not in (None, model.start_layer):
            raise UserError(
                f"start_layer is {start_layer}, but the view of the model starts at layer "
                f"{model.start_layer}"
            )
        model, start_layer = model.model, model.start_layer
    pipeline = pipeline_of(model) if isinstance(model, LANGUAGE_MODELS) else None
    if pipeline is None and not hasattr(model, "embedding"):
        raise UserError(
            f"{type(model).__name__} has no embedding: give a GPTModel, HybridModel or BertModel"
        )
    block = model.encoder if isinstance(model, BertModel) else model.decoder
    first = start_layer or 0
    if pipeline is not None and first > 0:
        raise UserError(
            f"layer {first}: over pipeline stages, what enters the first layer can be perturbed"
        )
    if pipeline is not None:
        return model, first
    if not 0 <= first < len(block.layers):
        raise UserError(f"there is no layer {first}: the model has {len(block.layers)}")
    return model, first


def _enter(
    model: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None, first: int,
    check_live: bool,
) -> torch.Tensor:
    """The hidden states that enter layer `first`, as constants."""
    facade: Any = traceable(model)
    block = facade.encoder if isinstance(model, BertModel) else facade.decoder
    clean = hidden.detach()
    with torch.no_grad():
        rotary = facade.rotary(hidden)
        for layer in block.layers[:first]:
            hidden = layer(hidden, mask, rotary)
    if check_live:
        check_entering(model, clean, mask, first, hidden)
    return hidden


def _mask(model: nn.Module, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S], True where masked."""
    batch, length = ids.shape
    given = tuple(mask.shape)
    if isinstance(model, BertModel):
        if given != (batch, length):
            raise UserError(
                f"attention_mask has shape {given}: a BertModel's is the padding mask "
                f"{(batch, length)}, 1 where kept"
            )
        keep = mask.to(torch.get_default_dtype())
        return (keep.unsqueeze(1) * keep.unsqueeze(2)).unsqueeze(1) < 0.5
    if given not in ((batch, 1, length, length), (1, 1, length, length)):
        raise UserError(
            f"attention_mask has shape {given}: a decoder's is {(batch, 1, length, length)} or "
            f"{(1, 1, length, length)}, True where masked"
        )
    return (mask != 0).expand(batch, -1, -1, -1)


# ---------------------------------------------------------------------- what may move


def _check_ids(ids: torch.Tensor) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise UserError(f"token ids have shape {tuple(ids.shape)}: give [B, S]")


def _check_directions(eps: Any, norm: float, substitutes: Any, rounding: str) -> None:
    if eps is None:
        raise UserError("directions need eps: how far the hidden states move along them")
    if substitutes is not None:
        raise UserError("directions and substitutes are two questions: give one of them")
    if norm != math.inf:
        raise UserError(f"along directions each number has a limit: norm is inf, not {norm:g}")
    if rounding == "outward":
        raise UserError('rounding="outward" does not cover directions: give a box')


def _around(
    hidden: torch.Tensor, eps: Any, norm: float, positions: Iterable[int] | None,
    off: torch.Tensor | None,
) -> auto_lirpa.PerturbationLpNorm:
    """The perturbation of hidden states [B, S, h] by eps, of which `off` says (None: nobody asks)
    how far they may be from real arithmetic's."""
    radii = _radii(hidden, eps, positions)
    if off is not None and norm == math.inf:
        low, high = _wider(*box_around(hidden, radii.unsqueeze(-1)), off)
        return auto_lirpa.PerturbationLpNorm(norm=norm, x_L=low, x_U=high)
    if off is not None:
        _check_exact(off, f"an L{norm:g} ball")
    number = not isinstance(eps, torch.Tensor) or eps.ndim == 0
    if number and positions is None:
        return auto_lirpa.PerturbationLpNorm(norm=norm, eps=float(eps))
    if norm == math.inf:
        low, high = hidden - radii.unsqueeze(-1), hidden + radii.unsqueeze(-1)
        return auto_lirpa.PerturbationLpNorm(norm=norm, x_L=low, x_U=high)
    found = PerturbationPositions(hidden, radii, norm, joint=number)
    if off is not None:
        found.x_L, found.x_U = box_around(hidden, radii.unsqueeze(-1))
    return found


def _wider(
    low: torch.Tensor, high: torch.Tensor, off: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The box with `off` more on each side where that is not 0."""
    wide = widened(low, high, off)
    return torch.where(off > 0, wide[0], low), torch.where(off > 0, wide[1], high)


def _check_exact(off: torch.Tensor, what: str) -> None:
    if bool((off > 0).any()):
        raise UserError(
            f'rounding="outward": the embeddings\' sums are not exact in float64, by up to '
            f"{off.max().item():.1g}, so {what} around them is not covered: use norm inf or a box, "
            "or tables stored in float32"
        )


def _radii(hidden: torch.Tensor, eps: Any, positions: Iterable[int] | None) -> torch.Tensor:
    """eps at each position, 0 at those not chosen: [B, S]."""
    batch, length = hidden.shape[:2]
    radii = torch.as_tensor(eps).to(hidden)
    if tuple(radii.shape) not in ((), (length,), (batch, length)):
        raise UserError(
            f"eps has shape {tuple(radii.shape)}: give a number, or a radius for each position, "
            f"{(length,)} or {(batch, length)}"
        )
    if not bool(((radii >= 0) & (radii < math.inf)).all()):
        smallest = radii.min().item()
        raise UserError(f"eps must be at least 0 and finite, its smallest value is {smallest:g}")
    if positions is not None:
        chosen = torch.zeros_like(hidden[0, :, 0])
        for position in positions:
            chosen[_position(position, length, "positions")] = 1
        radii = radii * chosen
    return radii.expand(batch, length)


def _position(position: Any, length: int, name: str) -> int:
    if not isinstance(position, int) or not -length <= position < length:
        raise UserError(f"{name}: there is no position {position!r} in a sequence of {length}")
    return position % length


# ------------------------------------------------------------------------ substitutes


def _check_substitutes(
    substitutes: Any, ids: torch.Tensor, shape: str, eps: Any, norm: float, first: int
) -> None:
    if first > 0:
        raise UserError(
            f"substitutes are words, which enter layer 0, not layer {first}: give eps there"
        )
    if eps is not None and shape == "hull":
        raise UserError("eps cannot be added to a hull of substitutes: choose shape='box'")
    if eps is not None and norm != math.inf:
        raise UserError(f"with substitutes eps enlarges their box: norm is inf, not {norm:g}")
    if not isinstance(substitutes, Mapping) and len(substitutes) != len(ids):
        raise UserError(
            f"substitutes are given for {len(substitutes)} samples, there are {len(ids)}"
        )


def _vertices(
    model: nn.Module, ids: torch.Tensor, substitutes: Substitutes | Sequence[Substitutes],
    words: Mapping[str, Any], made: Callable = embed,
) -> torch.Tensor:
    """Embeddings (or what `made` makes) of each position's own word and its substitutes:
    [B, S, K, h].

    K is the largest number of words at any position; others repeat their own.
    """
    batch, length = ids.shape
    given = [substitutes] * batch if isinstance(substitutes, Mapping) else substitutes
    choices = [
        {_position(p, length, "substitutes"): list(others) for p, others in sample.items()}
        for sample in given
    ]
    most = 1 + max((len(others) for sample in choices for others in sample.values()), default=0)
    every = ids.repeat(most, 1, 1)  # [K, B, S]: the k-th word at each position
    for b, sample in enumerate(choices):
        for position, others in sample.items():
            if others:
                every[1 : 1 + len(others), b, position] = torch.as_tensor(others).to(every)
    repeated = {
        name: value.repeat(most, 1) if isinstance(value, torch.Tensor) else value
        for name, value in words.items()
    }
    found = made(model, every.flatten(0, 1), **repeated)
    return found.unflatten(0, (most, batch)).movedim(0, 2)
