"""The rule of LayerNorm and RMSNorm: y = gamma z / s + beta, s^2 = |z|^2 / d + eps, z = P x.

With z = Z + R, Z the polynomial:

1. v = |Z|^2 / d + eps as a polynomial, and `over`, what its square has beyond degree p. For affine
   forms that lies in [0, N^2], N the norm of the linear part, so half of it goes to the centre.
2. 1/s of the polynomial: for affine forms v^(-1/2) lies within `rest` of the chord's slope times v
   (`_chord`: the function is convex, so the chord is above and the parallel tangent below); else by
   Taylor's formula.
3. y = (1/s) Z; beyond degree p by the parts' sizes and norms, or where errors are symbols by
   `product_range` or as one ball (`squares`), and rest (Z - z0). What `rest` does to z0 has one
   direction for each token (`columns`). D bounds all that the polynomial leaves out;
   |y| <= sqrt(d) whatever happens, so D_ball is at most that of y plus sqrt(d).
4. R through the linearised norm L = i0 I + (slope) z0 z0^T 2/d (at the centre): y(Z + R) - y(Z)
   = J R with J = (I - y y^T / d) / s at some points between, and |J - L| <= turn. With s_min and
   s_max over the whole set, and `moved` bounding the distance of y from its centre,
   `_turn` derives the bound from these. J R itself is at most |R| / s_min, and 2 sqrt(d).

Degenerate: a point stays a point; z = 0 is safe because eps > 0; infinite remainders leave
|y| <= sqrt(d).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lirpa_megatron.forward import squares
from lirpa_megatron.forward.error_symbols import product_range
from lirpa_megatron.forward.form import Form, Fresh, Inputs, Outcome, squared, times
from lirpa_megatron.forward.polynomials import compose, excess, plus
from lirpa_megatron.forward.rules import by_intervals, reading_shares, rule_for
from lirpa_megatron.operators.norm.norm import BoundNorm
from lirpa_megatron.operators.numerics import safe_root


def _length(x: torch.Tensor) -> torch.Tensor:
    return safe_root(squared(x).sum(-1))


def _chord(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(slope, middle, half): |v^(-1/2) - slope v - middle| <= half on [low, high], low > 0.

    The gap between chord and tangent is at most sup f'' (high - low)^2 / 8, which is what counts
    where their difference is lost to rounding.
    """
    a, b = low.rsqrt(), high.rsqrt()
    # (b - a) / (high - low) without cancellation: -1 / (sqrt(low high) (sqrt low + sqrt high))
    slope = -a * b / (low.sqrt() + high.sqrt())
    touch = (-2 * slope) ** (-2 / 3)
    above = a - slope * low
    below = touch.rsqrt() - slope * touch
    half = ((above - below) / 2).clamp(min=0) + 8 * torch.finfo(low.dtype).eps * a
    half = torch.minimum(half, 0.75 * a**5 * (high - low).square() / 16)
    return slope, (above + below) / 2, half


def square_excess(run: Any, z: torch.Tensor, norms: list[torch.Tensor]) -> torch.Tensor:
    """Bound of what <z, z> has beyond degree p."""
    p = run.order
    if not run.domain.is_interval:
        return excess(norms, norms, p)
    total = torch.zeros_like(norms[0])
    for k in range(p + 1, 2 * p + 1):
        terms = [(z[m] * z[k - m]).sum(-1) for m in range(k - p, p + 1)]
        total = total + sum(terms[1:], terms[0]).abs()
    return total


@rule_for(BoundNorm)
@reading_shares
def norm(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """See above."""
    x, gamma, *rest = inputs
    if isinstance(gamma, Form) or any(isinstance(b, Form) for b in rest):
        return by_intervals(run, node, inputs)
    ranks, d = run.ranks(node), node._d
    gamma, beta = ranks.enter(gamma), ranks.enter(rest[0]) if rest else None
    domain, p = run.domain_of(x), run.order
    algebra = domain.algebra
    split = x.c.unflatten(-1, (node.groups, d))
    r = x.box.unflatten(-1, (node.groups, d))
    rho = _group_ball(run, node, x, r)
    z = node._project(split)
    # ---- 1
    norms, sizes = domain.norms(z), domain.sizes(z)
    v = algebra.multiply(z, z, lambda f, g: (f * g).sum(-1)) / d
    over = square_excess(run, z, norms) / d
    if p == 1:
        over = over / 2
        v = torch.cat((v[:1] + node.eps + over, v[1:]))
    else:
        v = torch.cat((v[:1] + node.eps, v[1:]))
    still = sum(norms[1:]) == 0
    v_sizes = domain.sizes(v)
    reach, v0 = sum(v_sizes[1:]), v[0]
    smallest = torch.maximum(v0 - reach - over, torch.full_like(v0, node.eps))
    largest = v0 + reach + over
    # ---- 2
    if p == 1:
        slope, middle, left = _chord(smallest, torch.maximum(largest, smallest))
        inverse = plus(algebra.scaled(v, slope), middle)
        left = left + slope.abs() * over
        exact = still
        inverse = torch.where(
            exact, torch.cat((v0.rsqrt().unsqueeze(0), torch.zeros_like(inverse[1:]))), inverse
        )
        left, slope = torch.where(exact, 0.0, left), torch.where(exact, -0.5 * v0**-1.5, slope)
    else:
        inverse, left = _inverse_root(run, v, v_sizes, over, smallest)
        slope = -0.5 * v0**-1.5
    # ---- 3
    y = algebra.multiply(inverse, z, lambda f, g: f.unsqueeze(-1) * g)
    inverse_sizes = domain.sizes(inverse)
    balls = None
    if run.errors is None:
        D2, moved_centre = excess(sizes, [i.unsqueeze(-1) for i in inverse_sizes], p), None
    else:
        D2, moved_centre = product_range(domain, inverse[1:].unsqueeze(-1), z[1:])
        further = times(sum(sizes[1:]), left.unsqueeze(-1))
        balls = squares.of_norm(run, inverse[1:], z[1:], further, D2 + further)
        if balls is not None:
            D2 = torch.where(balls[0], D2 + moved_centre.abs(), D2)
            moved_centre = moved_centre.masked_fill(balls[0], 0.0)
        y = plus(y, moved_centre)
    y_norms, limit = domain.norms(y), d**0.5
    D2 = D2 + times(sum(sizes[1:]), left.unsqueeze(-1))
    D2_ball = torch.minimum(
        excess(norms, inverse_sizes, p) + times(sum(norms[1:]), left), _length(D2)
    ) if moved_centre is None else _length(D2)
    # ... and left z0
    most = sum(y_norms) + limit
    known = D2_ball + times(left, norms[0]) <= most
    left = torch.where(known, left, 0.0)
    D2_ball = torch.where(known, D2_ball, most)
    D2 = torch.minimum(torch.where(known.unsqueeze(-1), D2, torch.inf), D2_ball.unsqueeze(-1))
    radial = left.unsqueeze(-1) * z[0].abs()
    D, D_ball = D2 + radial, D2_ball + left * norms[0]
    # ---- 4
    s_low = (safe_root((d * (smallest - node.eps)).clamp(min=0)) - rho).clamp(min=0)
    s_min = (s_low.square() / d + node.eps).sqrt()
    s_high = safe_root((d * (largest - node.eps)).clamp(min=0)) + rho
    s_max = (s_high.square() / d + node.eps).sqrt()
    through = torch.minimum(rho / s_min, sum(y_norms) + D_ball + limit)
    away, y0 = sum(y_norms[1:]) + D_ball + through, inverse[0].unsqueeze(-1) * z[0]
    if moved_centre is not None:  # away from y0, not from the form's centre
        away = away + _length(moved_centre)
    turn = _turn(d, z[0], inverse[0], slope, s_min, s_max, away, y0)
    bent = torch.where(rho > 0, times(turn, rho), 0.0)
    ry = (r if node.rms else r + r.mean(-1, keepdim=True))
    ry = torch.minimum(ry, rho.unsqueeze(-1))
    Y = (sum(domain.sizes(y)) + D + through.unsqueeze(-1)).clamp(max=limit)
    moved = (ry + Y * (rho / limit).unsqueeze(-1)) / s_min.unsqueeze(-1)
    moved = torch.minimum(moved, through.unsqueeze(-1))
    box = D + moved
    along = inverse[0] + (2 / d * slope) * z[0].square().sum(-1)
    linear_size = torch.maximum(inverse[0].abs(), along.abs())
    ball = torch.minimum(torch.minimum(times(linear_size, rho) + bent, through) + D_ball,
                         _length(box))
    bent_box = torch.minimum(bent, times(linear_size, rho) + through)
    # gamma and beta
    c = algebra.scaled(y, gamma)
    if beta is not None:
        c = plus(c, beta)
    whole = gamma.repeat(node.groups) if node.groups > 1 else gamma
    grouped = ball if run.head_dim(node) else None
    form = Form(
        c.flatten(-2), (box * gamma.abs()).flatten(-2),
        safe_root(ranks.total(ball.square().sum(-1))), whole,
        None if grouped is None else grouped * gamma.abs().amax(), shared=x.shared,
    )
    z0, i0, centre = (f[0].clone() for f in (z, inverse, form.c))  # outlive the coefficients
    fresh = [
        Fresh(box=(D2 * gamma.abs()).flatten(-2), stretch=whole, **_balls(run, node, D2_ball)),
        Fresh(box=left, pull=lambda g: (g.unflatten(-1, (node.groups, d)) * gamma * z0).sum(-1)),
        Fresh(box=(bent_box.unsqueeze(-1) * gamma.abs().expand_as(D)).flatten(-2), stretch=whole,
              **_balls(run, node, bent_box)),
    ]

    def linear(value: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        w = node._project(value.unflatten(-1, (node.groups, d))) - z0
        along = (2 / d * slope) * (z0 * w).sum(-1)
        out = i0.unsqueeze(-1) * w + along.unsqueeze(-1) * z0
        return (out * gamma).flatten(-2) + centre

    if balls is not None:  # where D2 is bounded at all
        inside = balls[0] & known.unsqueeze(-1)
        balls = (balls[1] * inside * gamma).flatten(-2)
        D2 = D2.masked_fill(inside, 0.0)
    rest = ((D2 + moved) * gamma.abs()).flatten(-2)

    def columns() -> torch.Tensor:
        """One direction, z0, for each moving token."""
        size = torch.where(left.isfinite(), left, 0.0)
        moving = ranks.most((size != 0).any(0).to(size)).flatten().nonzero().flatten()
        direction = (size.unsqueeze(-1) * z0 * gamma).flatten(1, -2)  # [B, T groups, d]
        out = direction.new_zeros(len(moving), *direction.shape)
        out[torch.arange(len(moving)), :, moving] = direction[:, moving].movedim(1, 0)
        return out.reshape(len(moving), *form.shape)

    rest = torch.where(rest.isnan(), torch.inf, rest)
    return Outcome(form, fresh, linear, columns, balls, rest)


def _balls(run: Any, node: Any, balls: torch.Tensor) -> dict[str, Any]:
    """The balls of a fresh error, of its groups [B, T..., groups].

    Norms of heads have as many groups as a rank has heads, which may be one: it is a group all the
    same, so that bounds do not depend on the number of ranks.
    """
    if node.groups > 1 or run.context.is_sharded(node):
        return {"ball": balls, "grouped": True}
    return {"ball": balls.squeeze(-1)}


def _group_ball(run: Any, node: Any, x: Form, r: torch.Tensor) -> torch.Tensor:
    """The ball of each group's part of R: [B, ..., groups]."""
    own = run.ranks(node).enter(x.plain_ball()).unsqueeze(-1)
    if x.heads is not None and x.heads.shape[-1] == node.groups:
        own = x.heads
    return torch.minimum(own.expand(r.shape[:-1]), _length(r))


def _inverse_root(
    run: Any, v: torch.Tensor, sizes: list[torch.Tensor], over: torch.Tensor,
    smallest: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(polynomial of v^(-1/2), bound of the rest), by Taylor's formula around v's centre."""
    p, v0, reach = run.order, v[0], sum(sizes[1:])
    power = [math.prod((-0.5 - i) / (i + 1) for i in range(k)) for k in range(p + 2)]
    least = (1 - reach / v0).clamp(min=1e-3)
    inverse, rest = compose(
        run.algebra, v / v0, [a / v0 for a in sizes], [torch.full_like(v0, c) for c in power[:-1]],
        lambda S: abs(power[-1]) * least ** (-1.5 - p),
    )
    root = v0.rsqrt()
    rest = rest * root + 0.5 * torch.minimum(smallest, least * v0) ** -1.5 * over
    return inverse * root, torch.where(reach >= 0.999 * v0, torch.inf, rest)


def _turn(
    d: int, z0: torch.Tensor, i0: torch.Tensor, slope: torch.Tensor, s_min: torch.Tensor,
    s_max: torch.Tensor, moved: torch.Tensor, y0: torch.Tensor,
) -> torch.Tensor:
    """Bound of |J - L| over the set.

    J = (I - y y^T / d) / s. With y = Y + m, Y = y0 = i0 z0, |m| <= `moved` and
    |y|, |Y| <= sqrt(d) (1 + ...):

        |J - (I - Y Y^T / d) / s| <= (|y| + |Y|) |m| / (d s) <= (sqrt(d) + |Y|) moved / (d s_min)

    and (I - Y Y^T / d) / s - (i0 I + 2/d slope z0 z0^T), with Y = i0 z0, is a number times I plus
    a number times z0 z0^T: at most |1/s - i0| + |i0^2 / s + 2 slope| |z0|^2 / d, at the ends of s.
    """
    size = z0.square().sum(-1)
    turn = (d**0.5 + _length(y0)) / d * moved / s_min
    apart = torch.stack([
        (1 / s - i0).abs() + (i0.square() / s + 2 * slope).abs() * size / d
        for s in (s_min, s_max)
    ]).amax(0)
    apart = torch.where(s_max.isfinite(), apart, torch.inf)
    both = 1 / s_min + i0.abs() + 2 * slope.abs() * size / d
    return torch.minimum(turn + apart, both)
