"""LayerNorm and RMSNorm."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
    """What all rows of A share: the vectors, gamma and beta."""

    parts: list[Vectors]
    """All vectors together, or one entry for each position."""
    dealt: RoundRobinTensors | None
    """The parts' coefficients if each rank keeps only some of them; the parts then have none."""
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

    P subtracts the mean (LayerNorm) or is the identity (RMSNorm). Each of `groups` equal parts is
    normalised separately (the norms of queries and keys).

    **CROWN.** For a row let w = P (gamma * A). Then <gamma * A, z> = <w, x>, and only the scalar s
    r with s = <w, x> needs a relaxation. Around any c, with z0 = P c, x = c + dx, s0 = <w, z0>, ds
    = <w, dx>, and t = <z0, dx>:

        |z|^2 = q0 + 2 t + n,   q0 = |z0|^2,   0 <= n <= N = sum_i max dx_i^2,

    because |P dx| <= |dx|. f(q) = (q/d + eps)^(-1/2) is decreasing and convex, so with r0 = f(q0)

    - below: with q1 = q0 + N, r >= f(q1 + 2 t) >= its tangent at any t (at t = 0 without alpha);
    - above: r <= min(f(q0 + 2 t), f(q_least)) <= its chord over the range of t.

    q_least and q_most come from t's range and from the triangle inequality
    | |z0| - N^(1/2) | <= |z| <= |z0| + N^(1/2); q >= 0 always, so r never meets a negative
    variance. Exactly

        s r = r0 s + (s0 + m_s) dr + ds' dr,   dr = r - r0,   ds' = ds - m_s in [-S, S].

    The second term uses the line above or below, depending on its sign. The product is linearised
    in one of two ways; for each row and vector, the one with the smaller error is used:

    - dr = m + dr', |dr'| <= D (the range of r):  ds' dr >= m ds' - S D;
    - dr = k t + rho, k the slope below (k <= 0), t = m_t + t', rho = m_rho + rho', |rho'| <= D_rho:

          ds' dr >= (k m_t + m_rho) ds' + k max(ds' t') - S D_rho.

      ds' and t' are linear in the same dx, and for every lambda > 0
      ds' t' <= (lambda ds' + t'/lambda)^2 / 4, which is bounded by the range of one linear form:
      about half of the product of the two ranges if they are independent. lambda^2 = T/S.

    **Alpha** [.., groups, 2], two numbers in [-1, 1] for each row and vector, all of them sound.
    The first one, a, mixes McCormick's planes of the product: ds' dr' >= -S D becomes ds' dr' >= -S
    D - a (D ds' + S dr') (ds' rho' likewise). The second one moves the point t of the tangent below
    from 0 to the ends of t's range.

    If s > 0 and r's range is wide, as for a margin after the last norm,

        s r >= r_least s + s_least k (t - t_most)

    is better, where k <= 0 is the slope of the tangent at t_most if that ends at r_least (otherwise
    k = 0). It is used if its minimum over the known ranges is larger.

    S and t's range are computed over the box of x and over the affine form of x in the model's
    input (`affine.form`), which captures how x's coordinates depend on each other. The form has one
    slack for each coordinate, and <|w|, slack> is much larger than the true remainder of <w, x>.
    Therefore a separate row bounds t (`directions`), and in a pass of few rows also s. If the plane
    is worse than -sqrt(d) |w| <= s r on all of the box (wide inputs), that constant is used, with
    A_x = 0.

    **IBP.** z_i r lies in z_i's interval times r's, and |z_i r| <= sqrt(d) (sqrt(d - 1) for
    LayerNorm, whose z sums to 0).

    **Degenerate.** A zero-width box gives the tangent plane at its point, exact in value; q0 = 0
    (a constant vector) is safe because eps > 0. Infinite or NaN bounds give the constants.

    Relaxing <w, z> r as a whole is this project's idea; the bound of ds' dr is McCormick's for
    bilinear terms (1976).
    """

    reads_form = frozenset({0})
    takes_positions = True
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
        """The vectors, in parts that fit a processor's cache, with gamma and beta."""
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
        """z0 for each vector of x, [1, B, vectors, d]: a pass bounds <z0, x>."""
        z0 = self._project(self._split(self.value_of(0)))
        return z0.flatten(1, -2).unsqueeze(0)

    def of_vectors(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [1, B, vectors, ...], as in `directions`, to [B, *lead, ...]."""
        return x[0].unflatten(1, (*self.inputs[0].output_shape[1:-1], self.groups))

    def wanted_rows(self, A: LowerUpper, visit: Visit) -> list[torch.Tensor]:
        """w for each row and vector of x: a pass tightens the range of s = <w, x>."""
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
        """Whether a form is processed position by position: if it is large, or shared by the
        ranks."""
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
        """Whether the ranks may share a form with this many positions."""
        return not self.context.is_sharded(self) and 1 < self.context.collectives.size <= positions

    def _keep(self, parts: list[Vectors], call: CallState) -> RoundRobinTensors | None:
        """Copies what the parts need from a form that will be freed, without its columns of zeros.

        Returns:
            The parts' coefficients if each rank keeps only some of them; the parts then have none.
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
        """See `RowRelaxed`. Gathers the coefficients of the positions that the rows of A reach."""
        if visit.gathered is None:
            shared = self.shared_relaxation(visit.inputs)
        else:
            shared = visit.gathered
        parts, dealt = shared.parts, shared.dealt
        if dealt is None:
            return super().bound_backward(A, visit)
        A = A.dense()
        if visit.positions is not None:
            return self._at_all_positions(A, visit, len(parts))
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

    def _at_all_positions(self, A: LowerUpper, visit: Visit, length: int) -> Propagated:
        """`bound_backward` with zeros at the positions that A does not have."""
        first, end = visit.positions
        around = (0, 0, first, length - end)
        A = A.map(lambda A: torch.nn.functional.pad(A, around))
        found = self.bound_backward(A, replace(visit, positions=None))
        return replace(found, A=tuple(
            A.map(lambda A: A.narrow(2, first, end - first)) for A in found.A
        ))

    def at_positions(self, shared: _Normalized, first: int, end: int) -> _Normalized:
        parts = shared.parts
        if len(parts) > 1:
            return replace(shared, parts=parts[first:end])
        return replace(shared, parts=[part.at(first, end) for part in parts])

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
            if not torch.is_grad_enabled() and not own.any():  # 0 because of a causal mask
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
