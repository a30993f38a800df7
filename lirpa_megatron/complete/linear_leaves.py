"""Domains without an unstable neuron, where the network is linear: beta from a linear program.

With f_0(x) = c . x - threshold and f_j(x) = s_j z_j(x), all affine on the box, the goal fails in
the domain where f_0 <= 0 and all f_j >= 0. Whether there is such a point is a game:

    t* = min over the box of the largest of f_0, -f_1, ..., -f_k
       = max over weights w >= 0 of sum 1 of the least w_0 f_0 - sum w_j f_j over the box.

If t* > 0 there is none, and beta_j = w_j / w_0 proves it: the bound is t* / w_0. (Where the splits
contradict each other alone, w_0 goes to 0 and beta beyond any number.) If t* < 0, the point x at
which it is attained is a counterexample. What is found is a proposal: the bound is that of a pass
with this beta, the counterexample is tried on the model.

The game is solved by Newton's method on the barrier

    t / mu - sum log(t - h_i(x)) - sum log(x - l) - sum log(u - x),    h = (f_0, -f_1, ...),

for mu going to 0; w_i = mu / (t - h_i(x)). In y = x scaled to [-1, 1], with s_i = t - h_i, h = N y
+ c and the box's own second derivatives D, a step (dy, dt) solves

    D dy + N' u = -g_y,    1' u = g_t,    u = (w / s) (N dy - dt),

which leaves k + 2 equations in u and dt: (N D^-1 N' + s / w) u + dt = -N D^-1 g_y. Few, because
inputs are many and splits are few.
"""

from __future__ import annotations

import torch

_ROUNDS, _NEWTON = 14, 12
_SMALLEST_WEIGHT = 1e-7


def solve_game(
    M: torch.Tensor, b: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least over a box of the largest of M x + b.

    Args:
        M: [k + 1, inputs] float64; and b [k + 1].
        low, high: the box, [inputs] float64; inputs of no width are constants.

    Returns:
        weights w [k + 1] of sum 1, and the point x [inputs].
    """
    free = (high > low).nonzero().flatten()
    x = (low + high) / 2
    width = (high - low)[free] / 2
    # y in [-1, 1]
    N, c = M[:, free] * width, M @ x + b
    size = float(torch.cat([N.abs().sum(1), c.abs()]).max().clamp(min=1e-300))
    N, c = N / size, c / size
    K = torch.ones(len(c) + 1, len(c) + 1, dtype=c.dtype, device=c.device)
    K[-1, -1] = 0
    y, t, mu = torch.zeros_like(width), c.max() + 1, 1.0
    most, best = -float("inf"), torch.full_like(c, 1 / len(c))
    for _ in range(_ROUNDS):
        mu *= 0.15
        for _ in range(_NEWTON):
            slack = t - (N @ y + c)
            below, above = 1 + y, 1 - y
            w = mu / slack
            g, g_t = N.t() @ w - mu / below + mu / above, 1 - w.sum()
            D = mu / below**2 + mu / above**2
            K[:-1, :-1] = (N / D) @ N.t() + torch.diag(slack / w)
            u = torch.linalg.solve_ex(K, torch.cat([-N @ (g / D), g_t[None]]))[0]
            dy, dt = (-g - N.t() @ u[:-1]) / D, u[-1]
            if not bool(dy.isfinite().all() & dt.isfinite()):
                break
            # as far as all logarithms stay defined
            closing = torch.cat([-dy / below, dy / above, (N @ dy - dt) / slack]).max()
            length = min(1.0, 0.9 / float(closing.clamp(min=1e-300)))
            y, t = y + length * dy, t + length * dt
            if float(-(g @ dy + g_t * dt)) < 1e-9 * mu:
                break
        # Where mu is small, slacks are differences of nearly equal numbers: the best weights count.
        w = mu / (t - (N @ y + c))
        w = w / w.sum()
        value = float(w @ c - (w @ N).abs().sum())
        if value > most:
            most, best = value, w
    x[free] = x[free] + width * y
    return best, x


def proposal(
    forms: torch.Tensor, constants: torch.Tensor, signs: torch.Tensor, low: torch.Tensor,
    high: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multipliers for one row of one domain, and where the goal may fail.

    Args:
        forms: c and the z_j as functions of the input, [k + 1, inputs] float64.
        constants: c's minus its threshold, and the z_j's: [k + 1].
        signs: of the splits, [k]; 0 for none.
        low, high: the box, [inputs].

    Returns:
        beta [k], and x [inputs].
    """
    turn = torch.cat([signs.new_ones(1), -signs])
    here = torch.cat([signs != 0, signs.new_ones(1).bool()]).roll(1)
    w, x = solve_game(
        (forms * turn[:, None])[here], (constants * turn)[here], low.clone(), high.clone()
    )
    beta = signs.new_zeros(len(signs))
    beta[signs != 0] = w[1:] / w[0].clamp(min=_SMALLEST_WEIGHT)
    return beta, x
