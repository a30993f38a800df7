"""Sets of inputs that the host lacks, checks of what is perturbed, and boxes around balls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lirpa_megatron.arithmetic.floating import box_around
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError


class PerturbationInBox(auto_lirpa.PerturbationLpNorm):
    """A set of inputs inside a box; a subclass is a new set (docs/extending.md).

    IBP, and every operator that reads the input directly, uses the box from x_L to x_U. The set
    itself is used where A is concretized: a subclass says there what `extreme` is. Every tensor and
    number that it keeps as an attribute must be the same on all ranks, which is checked.

    Args:
        x_L: lower end of the smallest box around the set, [B, *input shape].
        x_U: upper end, of the same shape.
    """

    def __init__(self, x_L: torch.Tensor, x_U: torch.Tensor) -> None:
        super().__init__(norm=float("inf"), x_L=x_L, x_U=x_U)

    def concretize(
        self, x: torch.Tensor, A: torch.Tensor | None, sign: int = -1, aux: Any = None, **_: Any
    ) -> torch.Tensor | None:
        """Minimum (sign -1) or maximum (+1) of <A, x> over the set.

        Args:
            x: the clean input [B, *input shape].
            A: [B, R, *input shape], also flattened, or None.
            sign: -1 or 1.
            aux: unused.

        Returns:
            [B, R], or None without A.
        """
        if A is None:
            return None
        return self.extreme(x, A.reshape(*A.shape[:2], *x.shape[1:]), sign)

    def extreme(self, x: torch.Tensor, A: torch.Tensor, sign: int) -> torch.Tensor:
        """Minimum (sign -1) or maximum (+1) of <A, x'> over x' in the set, differentiable in A.

        Args:
            x: the clean input [B, *input shape].
            A: [B, R, *input shape].
            sign: -1 or 1.

        Returns:
            [B, R].
        """
        raise NotImplementedError

    def holds(self, x: torch.Tensor) -> bool:
        """Whether a clean input [B, *input shape] is known to be in the set; False: not known."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({tuple(self.x_L.shape)})"


class PerturbationHull(PerturbationInBox):
    """At each position any point of the convex hull of its own vertices, independently.

    A linear function is extreme at vertices: min <A, x> = sum_s min_k <A_s, v_sk>.

    Args:
        vertices: [B, S, K, h]; positions with fewer than K vertices repeat one of theirs.

    Raises:
        UserError: vertices of another shape, or none at all.
    """

    rounding_known = True
    """`rounding.charges` covers what its extremes are off."""

    def __init__(self, vertices: torch.Tensor) -> None:
        if vertices.ndim != 4 or vertices.shape[2] == 0:
            given = tuple(vertices.shape)
            raise UserError(f"vertices have shape {given}: give [B, S, K, h], K at least 1")
        super().__init__(vertices.amin(2), vertices.amax(2))
        self.vertices = vertices

    def extreme(self, x: torch.Tensor, A: torch.Tensor, sign: int) -> torch.Tensor:
        values = torch.einsum("brsh,bskh->brsk", A, self.vertices.to(A))
        return (values.amax(-1) if sign > 0 else values.amin(-1)).sum(-1)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether x is one of the vertices at each position: other points are not looked for."""
        return bool((self.vertices.to(x) == x.unsqueeze(2)).all(-1).any(-1).all())


class PerturbationPositions(PerturbationInBox):
    """An L1 or L2 ball over some positions, or one ball for each position.

    max <A, x - c> is sum_s r_s ||A_s||_q for balls of radius r_s at each position s, 1/p + 1/q = 1,
    and (sum_s (r ||A_s||_q)^q)^1/q for one ball of radius r over all positions of radius r (the
    others have radius 0).

    Args:
        x: the clean input c, [B, S, h].
        radii: [B, S].
        norm: 1 or 2.
        joint: one ball over all positions instead of one for each.
    """

    rounding_known = True
    """`rounding.charges` covers what its extremes are off."""

    def __init__(self, x: torch.Tensor, radii: torch.Tensor, norm: float, joint: bool) -> None:
        super().__init__(x - radii.unsqueeze(-1), x + radii.unsqueeze(-1))
        self.radii, self.joint = radii, joint
        self.dual = 2.0 if norm == 2 else float("inf")

    def extreme(self, x: torch.Tensor, A: torch.Tensor, sign: int) -> torch.Tensor:
        reach = torch.linalg.vector_norm(A, self.dual, dim=-1) * self.radii.to(A).unsqueeze(1)
        if self.joint:
            deviation = torch.linalg.vector_norm(reach, self.dual, dim=-1)
        else:
            deviation = reach.sum(-1)
        return (A * x.unsqueeze(1)).flatten(2).sum(-1) + sign * deviation

    def holds(self, x: torch.Tensor) -> bool:
        """Its centre is."""
        return True


class PerturbationSegments(PerturbationInBox):
    """The points x + sum_i t_i D_i, -1 <= t_i <= 1: a segment, or a parallelepiped.

    max <A, x'> = <A, x> + sum_i |<A, D_i>|.

    Args:
        x: the centre, [B, *input shape].
        directions: D, [B, d, *input shape].

    Raises:
        UserError: directions of another shape, or none.
    """

    def __init__(self, x: torch.Tensor, directions: torch.Tensor) -> None:
        given, shape = tuple(directions.shape), tuple(x.shape)
        if len(given) != len(shape) + 1 or (given[0], *given[2:]) != shape or given[1] == 0:
            raise UserError(
                f"directions have shape {given}: for inputs {shape} give "
                f"({shape[0]}, d, {', '.join(map(str, shape[1:]))}), d at least 1"
            )
        reach = directions.detach().abs().sum(1)
        super().__init__(x.detach() - reach, x.detach() + reach)
        self.centre, self.directions = x, directions

    def extreme(self, x: torch.Tensor, A: torch.Tensor, sign: int) -> torch.Tensor:
        along = A.flatten(2) @ self.directions.to(A).flatten(2).transpose(1, 2)  # [B, R, d]
        middle = (A * self.centre.to(A).unsqueeze(1)).flatten(2).sum(-1)
        return middle + sign * along.abs().sum(-1)

    def holds(self, x: torch.Tensor) -> bool:
        """Its centre is."""
        return torch.equal(x, self.centre.to(x))


def _parts(ptb: Any) -> list[str]:
    """Names of the attributes that say what a perturbation is."""
    if not isinstance(ptb, PerturbationInBox):
        return ["x_L", "x_U", "eps", "norm"]
    plain = (torch.Tensor, bool, int, float, str)
    return sorted(name for name, value in vars(ptb).items() if isinstance(value, plain))


def described(x: Sequence[Any]) -> dict[str, torch.Tensor | str | None]:
    """Everything that the ranks must agree on about the inputs: name -> value."""
    values: dict[str, torch.Tensor | str | None] = {"the number of inputs": str(len(x))}
    for i, value in enumerate(x):
        if not isinstance(value, torch.Tensor):
            continue
        values[f"input {i}"] = value
        ptb = getattr(value, "ptb", None)
        values[f"the perturbation of input {i}"] = type(ptb).__name__
        for name in _parts(ptb):
            part = getattr(ptb, name, None)
            values[f"{name} of input {i}"] = part if isinstance(part, torch.Tensor) else str(part)
    return values


def is_box(ptb: Any) -> bool:
    """Whether the perturbation is all of a box: IBP is then exact in a first linear layer."""
    part = auto_lirpa.is_ball(ptb) or isinstance(ptb, PerturbationInBox)
    return isinstance(ptb, auto_lirpa.PerturbationLpNorm) and not part


def check_perturbations(
    module: auto_lirpa.HostBoundedModule, x: Sequence[Any], method: str
) -> None:
    """Refuses perturbations that have no sound bound here.

    Raises:
        ValueError: a negative radius, an empty or NaN box, a batch that differs between inputs.
        NotImplementedError: perturbed parameters; an L1 or L2 ball with an IBP method where
            something other than a linear layer reads it.
    """
    for node in auto_lirpa.roots(module):
        if isinstance(node, auto_lirpa.BoundParams) and node.perturbation is not None:
            raise NotImplementedError(
                f"parameter {node.ori_name!r} is perturbed: on a sharded model, only inputs can be"
            )
    for i, value in enumerate(x):
        ptb = getattr(value, "ptb", None)
        if not isinstance(ptb, auto_lirpa.PerturbationLpNorm):
            continue
        _check_shapes(i, value, ptb)
        if ptb.x_L is not None and ptb.x_U is not None:
            # Also catches NaN, which compares false.
            if not bool((ptb.x_L <= ptb.x_U).all()):
                worst = (ptb.x_L - ptb.x_U).max().item()
                raise ValueError(
                    f"input {i}: the box is empty or NaN (x_L exceeds x_U by up to {worst:g})"
                )
        elif not bool((torch.as_tensor(ptb.eps) >= 0).all()):
            raise ValueError(f"input {i}: eps is {ptb.eps}, it must be at least 0")
        if auto_lirpa.is_ball(ptb) and method in ("IBP", "CROWN-IBP"):
            _check_ball_for_ibp(module, i, ptb)


def _check_shapes(index: int, x: torch.Tensor, ptb: Any) -> None:
    """Refuses sets whose shape does not say which number belongs to which.

    A radius [B] would broadcast to the last dimension, which for a batch of that size is another
    set; balls have one radius for all samples.
    """
    shape = tuple(x.shape)
    if not x.is_floating_point():
        raise ValueError(
            f"input {index} is perturbed, but it is {x.dtype}: a perturbed input must be floating "
            "point; for token ids, perturb their embeddings"
        )
    for name in ("x_L", "x_U"):
        bound = getattr(ptb, name, None)
        if isinstance(bound, torch.Tensor) and tuple(bound.shape) != shape:
            raise ValueError(
                f"input {index}: {name} has shape {tuple(bound.shape)}, the input {shape}: give "
                "one bound for each number (expand it)"
            )
    eps = getattr(ptb, "eps", None)
    if not isinstance(eps, torch.Tensor) or eps.numel() == 1:
        return
    if auto_lirpa.is_ball(ptb):
        raise ValueError(
            f"input {index}: eps has shape {tuple(eps.shape)} with norm {ptb.norm:g}: a ball has "
            "one radius: give a number, and bound samples with other radii in a separate call"
        )
    sizes = tuple(eps.shape)
    fits = len(sizes) == len(shape) and all(
        n in (1, m) for n, m in zip(sizes, shape, strict=True)
    )
    if not fits and getattr(ptb, "x_L", None) is None:
        raise ValueError(
            f"input {index}: eps has shape {sizes}, the input {shape}: give a number, or a tensor "
            f"with {len(shape)} dimensions, each the input's or 1 (eps[:, None] for one radius for "
            "each sample)"
        )


def _check_ball_for_ibp(module: auto_lirpa.HostBoundedModule, index: int, ptb: Any) -> None:
    """The host's IBP knows an L1 or L2 ball only in the first linear layer."""
    nodes = module.named_nodes()
    names = [n for n, i in zip(module.input_name, module.input_index, strict=True) if i == index]
    todo = [nodes[consumer] for name in names for consumer in nodes[name].output_name]
    while todo:
        node = todo.pop()
        if type(node).__name__ in ("BoundFlatten", "BoundReshape", "BoundIdentity"):
            todo += [nodes[name] for name in node.output_name]
        elif getattr(node, "boxes_balls", False):
            continue
        elif not isinstance(node, auto_lirpa.BoundLinear):
            raise NotImplementedError(
                f"IBP of an L{ptb.norm:g} ball that {type(node).__name__} reads directly: "
                "auto_LiRPA would take the ball for its center; use CROWN or an L-inf box"
            )


def enclose_balls(roots: Sequence[auto_lirpa.Bound], outward: bool = False) -> None:
    """Gives an L1 or L2 ball the box around it as bounds of the input node.

    The host sets lower = upper = center there, and an activation or product that reads the input
    directly would be relaxed at that one point, which is unsound. |x_i - c_i| <= eps holds for
    every Lp ball. The ball itself is used where A is concretized. With `outward` the box's ends are
    rounded outwards.
    """
    for node in roots:
        ptb = getattr(node, "perturbation", None)
        if auto_lirpa.is_ball(ptb) and node.lower is node.upper:
            if outward:
                node.lower, node.upper = box_around(node.center, ptb.eps)
            else:
                node.lower, node.upper = node.center - ptb.eps, node.center + ptb.eps
            node.interval = (node.lower, node.upper)
