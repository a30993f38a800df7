"""Domains without an unstable neuron, where the network is linear: beta from a linear program.

With f_r(x) = c_r . x - t_r of the goal's R rows and z_j(x) of the k splits, all affine on the box,
the goal fails in the domain where all f_r <= 0 and all s_j z_j >= 0. Whether there is such a point
is a game:

    t* = min over the box of the largest of f_1, ..., f_R, -s_1 z_1, ..., -s_k z_k
       = max over w, v >= 0 of sum 1 of the least of sum w_r f_r - sum v_j s_j z_j over the box.

If t* > 0 there is none, and with W = sum w_r the weights w_r / W of the rows' sum and
beta_j = v_j / W prove it: the bound is t* / W. (Where the splits contradict each other alone, W
goes to 0 and beta beyond any number.) If t* < 0, the point x at which it is attained is a
counterexample. What is found is a proposal: the bound is that of a pass with these multipliers, the
counterexample is tried on the model.

The game is solved by Newton's method on the barrier

    t / mu - sum log(t - h_i(x)) - sum log(x - l) - sum log(u - x),    h = (f, -s z),

for mu going to 0; w_i = mu / (t - h_i(x)). In y = x scaled to [-1, 1], with s_i = t - h_i, h = N y
+ c and the box's own second derivatives D, a step (dy, dt) solves

    D dy + N' u = -g_y,    1' u = g_t,    u = (w / s) (N dy - dt),

which leaves R + k + 1 equations in u and dt: (N D^-1 N' + s / w) u + dt = -N D^-1 g_y. Few, as
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
        M: [m, inputs] float64; and b [m].
        low, high: the box, [inputs] float64; inputs of no width are constants.

    Returns:
        weights [m] of sum 1, and the point x [inputs].
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multipliers for one domain, and where its goal may fail.

    Args:
        forms: rows and s_j z_j as functions of the input, [R + k, inputs] float64.
        constants: theirs, less the thresholds of rows: [R + k].
        signs: of the splits, [k]; 0 for none.
        low, high: the box, [inputs].

    Returns:
        weights of the rows [R] of sum 1, beta [k], and x [inputs].
    """
    R = len(forms) - len(signs)
    turn = torch.cat([signs.new_ones(R), -signs.abs()])
    here = turn != 0
    w, x = solve_game(
        (forms * turn[:, None])[here], (constants * turn)[here], low.clone(), high.clone()
    )
    all_rows = w[:R].sum().clamp(min=_SMALLEST_WEIGHT)
    beta = signs.new_zeros(len(signs))
    beta[signs != 0] = w[R:] / all_rows
    return w[:R] / all_rows, beta, x
