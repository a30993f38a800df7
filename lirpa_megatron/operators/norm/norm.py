"""LayerNorm and RMSNorm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import exact
from lirpa_megatron.operators.affine.form import AffineForm, LinearFormBounds
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.context import CallState, OperatorInputs, Visit
from lirpa_megatron.operators.functional import normalized
from lirpa_megatron.operators.norm.planes import LARGEST, NormPlanes, Vectors
from lirpa_megatron.operators.numerics import mask_overflow
from lirpa_megatron.operators.relaxed import RowRelaxed, rows_below
from lirpa_megatron.parallel.round_robin import RoundRobinTensors


@dataclass(frozen=True)
class _Normalized:
    """What is known of the vectors, for all rows of A alike."""

    parts: list[Vectors]
    """All vectors, or those of one position after the other."""
    dealt: RoundRobinTensors | None
    """The parts' coefficients where every rank keeps some of them; the parts have none then."""
    gamma: torch.Tensor
    """[d]."""
    beta: torch.Tensor | None


class BoundNorm(NormPlanes, RowRelaxed):
    """y = gamma * z * r(z) + beta with z = P x and r(z) = (|z|^2 / d + eps)^(-1/2).

    ============  =====================  =====================================================
    tensor        shape                  on the ranks
    ============  =====================  =====================================================
    x, y          [B, ..., groups d]     replicated, or sharded between a Column and a Row
    gamma, beta   [d]                    replicated
    A_y, A_x      [R, B, ..., groups d]  the layout of y (`crown.placement`)
    ============  =====================  =====================================================

    P takes the mean off (LayerNorm) or is the identity (RMSNorm); each of `groups` equal parts is
    normalised by itself (the norms of queries and keys).

    **CROWN.** For a row let w = P (gamma * A). Then <gamma * A, z> = <w, x>, and what needs a plane
    is the scalar s r with s = <w, x>. Around any c, with z0 = P c, x = c + dx, s0 = <w, z0>,
    ds = <w, dx>, and t = <z0, dx>:

        |z|^2 = q0 + 2 t + n,   q0 = |z0|^2,   0 <= n <= N = sum_i max dx_i^2,

    because |P dx| <= |dx|. f(q) = (q/d + eps)^(-1/2) falls and is convex, so with r0 = f(q0)

    - below: r >= f(q1 + 2 t) >= its tangent at any t, at t = 0 without alpha, q1 = q0 + N;
    - above: r <= min(f(q0 + 2 t), f(q_least)) <= its chord over the t that can be.

    q_least and q_most come from t's range and from the triangle inequality
    | |z0| - N^(1/2) | <= |z| <= |z0| + N^(1/2); q >= 0 always, so r never meets a negative
    variance. Exactly

        s r = r0 s + (s0 + m_s) dr + ds' dr,   dr = r - r0,   ds' = ds - m_s in [-S, S].

    The second term takes the line above or below, by its sign. The product is linearised in one of
    two ways, for each row and vector the one with the smaller error:

    - dr = m + dr', |dr'| <= D (the range of r):  ds' dr >= m ds' - S D;
    - dr = k t + rho, k the slope below (k <= 0), t = m_t + t', rho = m_rho + rho', |rho'| <= D_rho:

          ds' dr >= (k m_t + m_rho) ds' + k max(ds' t') - S D_rho.

      ds' and t' are linear in the same dx, and for every lambda > 0
      ds' t' <= (lambda ds' + t'/lambda)^2 / 4, whose range is that of one linear form: about half
      of the product of the two ranges, when the two are independent. lambda^2 = T/S.

    **Alpha** [.., groups, 2], two numbers in [-1, 1] for each row and vector, any of which is
    sound: the first mixes McCormick's planes of the product, which replaces ds' dr' >= -S D by
    ds' dr' >= -S D - a (D ds' + S dr') (ds' rho' likewise); the second moves the point t of the
    tangent below from 0 to the ends of t's range.

    Where s > 0 and r's range is wide, as in a margin behind the last norm,

        s r >= r_least s + s_least k (t - t_most)

    is better, k <= 0 the slope of the tangent at t_most, where that ends at r_least (else k = 0).
    It is taken where its least value over all that is known is the larger one.

    S and t's range are those over the box of x and over the affine form of x in the model's input
    (`affine.form`), which knows how x's coordinates go together. The form's slacks are those of
    single coordinates, and <|w|, slack> is much more than w itself leaves open; so t is bounded by
    a row of its own as well (`directions`), and in the pass of a few rows of the output so is s.
    Where the plane is worse even than
    -sqrt(d) |w| <= s r on all of the box (wide inputs), that constant is taken, with A_x = 0.

    **IBP.** Each z_i r within [z_i's interval times r's], and |z_i r| <= sqrt(d) (sqrt(d - 1) for
    LayerNorm, whose z sums to 0).

    **Degenerate.** A zero-width box gives the tangent plane at its point, exact in value; q0 = 0
    (a constant vector) is safe by eps > 0. Infinite or NaN bounds give the constants.

    The idea of relaxing <w, z> r as a whole is this project's; the McCormick step for ds' dr is
    that of bilinear terms (McCormick, 1976).
    """

    reads_form = frozenset({0})
    asks_directions = True
    asks_rows = True

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.eps, self.rms, self.groups = attr["eps"], bool(attr["rms"]), attr["groups"]
        self.requires_input_bounds = [0]

    def forward(self, x: torch.Tensor, w: torch.Tensor, b: Any = None) -> torch.Tensor:
        w, b = self.replicated(w), None if b is None else self.replicated(b)
        return normalized(x, w, b, self.eps, self.rms, self.groups)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.groups, -1))

    @property
    def _d(self) -> int:
        return self.inputs[0].output_shape[-1] // self.groups

    # --------------------------------------------------------------------- CROWN

    def alpha_shape(self) -> tuple[int, ...]:
        return *self.inputs[0].lower.shape[:-1], self.groups, 2

    def relaxation(self, inputs: OperatorInputs) -> _Normalized:
        """The vectors in parts that fit a processor's cache, and gamma and beta."""
        x, known = inputs[0], inputs.directions
        boxes = [self._split(z) for z in (x.lower, x.upper, x.value)]
        form = None if x.form is None else x.form.split(self._d)
        if form is not None and boxes[0].ndim > 3 and self._is_in_parts(form, inputs.call):
            parts = [
                self._vectors(
                    *(z.narrow(1, t, 1) for z in boxes), form.at(1, t),
                    None if known is None else known.at(1, t),
                ) for t in range(boxes[0].shape[1])
            ]
            dealt = self._keep(parts, inputs.call)
        else:
            parts, dealt = [self._vectors(*boxes, form, known)], None
        beta = inputs[2].value if len(inputs) > 2 else None
        return _Normalized(parts, dealt, inputs[1].value, beta)

    def directions(self) -> torch.Tensor:
        """z0, one for each vector of x: rows that are worth a pass; [1, B, vectors, d]."""
        z0 = self._project(self._split(self.value_of(0)))
        return z0.flatten(1, -2).unsqueeze(0)

    def of_vectors(self, x: torch.Tensor) -> torch.Tensor:
        """[1, B, vectors, ...] of `directions` -> [B, *lead, ...]."""
        return x[0].unflatten(1, (*self.inputs[0].output_shape[1:-1], self.groups))

    def wanted_rows(self, A: LowerUpper, visit: Visit) -> list[torch.Tensor]:
        """w, one for each row and vector of x: with its range s = <w, x> is known better."""
        gamma = self.relaxation_at(visit).gamma
        return [
            self._project(self._split(rows) * gamma).flatten(2, -2)
            for rows in rows_below(A, self.context.tuning.few)
        ]

    def numbers_at_once(self, batch: int, form_columns: int | None, call: CallState) -> int:
        if form_columns is None:
            return 0
        return math.prod(self.output_shape[1:]) // self._d * form_columns

    def _is_in_parts(self, form: AffineForm, call: CallState) -> bool:
        """Whether a form is used position by position: a large one, and one that ranks share."""
        A = form.A
        if A.numel() > self.context.tuning.whole_form.get(A.device.type, math.inf):
            return True
        if call.rereads or A.device.type == "cpu":
            return False
        room = call.form_room - A.nbytes
        if self._is_dealt(A.shape[1]) and room < 0:
            return True
        call.form_room = room
        return False

    def _is_dealt(self, positions: int) -> bool:
        """Whether ranks may share the form of so many positions."""
        return not self.context.is_sharded(self) and 1 < self.context.collectives.size <= positions

    def _keep(self, parts: list[Vectors], call: CallState) -> RoundRobinTensors | None:
        """Copies what the parts need of a form that is let go, without its columns of zeros.

        Returns:
            The parts' coefficients where every rank keeps some of them; the parts have none then.
        """
        if call.rereads:
            return None
        coefficients = [x.dx.form.A for x in parts]
        size = sum(A.numel() for A in coefficients) * coefficients[0].element_size()
        dealt = None
        if self._is_dealt(len(parts)):
            if size > call.form_room:
                dealt = RoundRobinTensors(self.context.collectives, coefficients)
            else:
                call.form_room -= size
        for x in parts:
            form = x.dx.form
            A = None if dealt is not None else form.A.clone()
            x.dx.form = AffineForm(form.center.clone(), A, form.slack.clone(), form.norm)
        return dealt

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """See `RowRelaxed`. Brings together the form's coefficients that the rows of A reach."""
        shared = self.relaxation_at(visit)
        parts, dealt = shared.parts, shared.dealt
        if dealt is None:
            return super().bound_backward(A, visit)
        A = A.dense()
        reached = torch.stack([
            (side != 0).movedim(2, 0).flatten(1).any(1) for side in A if side is not None
        ]).any(0)
        counts = reached * torch.arange(1, len(parts) + 1, device=reached.device)
        count = int(self.context.collectives.largest(counts.max()))
        for part, coefficients in zip(parts, dealt.first(count), strict=False):
            part.dx.form.A = coefficients
        try:
            return super().bound_backward(A, visit)
        finally:
            for part in parts:
                part.dx.form.A = None

    def lower_plane(
        self, A: torch.Tensor, shared: _Normalized, move: torch.Tensor | None = None,
        known: LinearFormBounds | None = None,
    ) -> tuple[tuple, torch.Tensor]:
        """A [R, B, ..., groups d] -> (A_x of the same shape,), bias [R, B]."""
        parts, gamma, beta = shared.parts, shared.gamma, shared.beta
        A = self._split(A)
        if known is not None:
            known = known.mapped(lambda x: x.unflatten(2, A.shape[2:-1]))
        found = []
        for t, x in enumerate(parts):
            own, moved, s = A, move, known
            if len(parts) > 1:
                own = A.narrow(2, t, 1)
                moved = None if move is None else move.narrow(2, t, 1)
                s = None if known is None else known.at(2, t)
            if not torch.is_grad_enabled() and not own.any():  # what a causal mask keeps from it
                found.append((torch.zeros_like(own), exact(own.new_zeros(own.shape[:-1]))))
                continue
            found.append(self._plane(self._project(own * gamma), x, moved, s))
        coef, value = found[0]
        if len(parts) > 1:
            coef = torch.cat([coef for coef, _ in found], 2)
            value = torch.cat([value for _, value in found], 2)
        bias = value.flatten(2).sum(-1)
        if beta is not None:
            bias = bias + (A * beta).flatten(2).sum(-1)
        return (coef.flatten(-2),), bias

    # ----------------------------------------------------------------------- IBP

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Interval bounds of y, [B, ..., groups d]."""
        l, u = self._split(v[0][0]), self._split(v[0][1])
        limit = math.nextafter((self._d if self.rms else self._d - 1) ** 0.5, math.inf)
        l, u, wild = mask_overflow(l, u, LARGEST)
        x = self._vectors(l, u, (l + u) / 2, None)
        if not self.rms:
            d, sums = self._d, (l.sum(-1, keepdim=True), u.sum(-1, keepdim=True))
            l, u = l - (sums[1] - u + l) / d, u - (sums[0] - l + u) / d
        least, most = x.r_least.unsqueeze(-1), x.r_most.unsqueeze(-1)
        low = torch.minimum(l * most, l * least).clamp(-limit, limit)
        high = torch.maximum(u * most, u * least).clamp(-limit, limit)
        wild = wild.any(-1, keepdim=True)
        low, high = torch.where(wild, -limit, low), torch.where(wild, limit, high)
        gamma = self.replicated(v[1][0])
        up, down = gamma.clamp(min=0), gamma.clamp(max=0)
        lower, upper = up * low + down * high, up * high + down * low
        if len(v) > 2:
            beta = self.replicated(v[2][0])
            lower, upper = lower + beta, upper + beta
        return lower.flatten(-2), upper.flatten(-2)
