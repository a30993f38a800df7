"""Forms of all nodes of a graph, and whether the nodes' values stay in them."""

from __future__ import annotations

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.forward.form import Form
from lirpa_megatron.forward.method import forward_run


def forms_of(bounded, inputs):
    """(run, node name -> form) of a forward pass."""
    forms: dict[str, Form] = {}
    with torch.no_grad():
        bounded.compute_bounds(inputs, method="forward")
        run = forward_run(bounded)
        run.to(bounded[bounded.final_name], lambda node, form: forms.update({node.name: form}))
    return run, forms


def draw(groups, count, generator=None):
    """Points of the symbols' set [count, N]: corners, edges and inner points."""
    parts = []
    for group in groups:
        for _ in range(group.count):
            x = torch.randn(count, group.size, generator=generator)
            share = torch.rand(count, 1, generator=generator)
            share[: count // 2] = 1
            if group.kind == "box":
                parts.append(torch.where(share == 1, x.sign(), x.clamp(-1, 1)))
            elif group.kind == "l2":
                parts.append(share * x / x.norm(dim=1, keepdim=True).clamp_min(1e-300))
            elif group.kind == "l1":
                top = torch.zeros_like(x).scatter_(1, x.abs().argmax(1, keepdim=True), 1.0)
                parts.append(share * top * x.sign())
            else:
                full = torch.cat((x, torch.randn(count, 1, generator=generator)), 1)
                corner = torch.zeros_like(full).scatter_(1, full.argmax(1, keepdim=True), 1.0)
                weights = torch.where(share == 1, corner, torch.softmax(full, 1))
                parts.append(weights[:, :-1] - 1 / (group.size + 1))
    return torch.cat(parts, 1) if parts else torch.zeros(count, 0)


def monomials(run, s, own):
    """Values of the monomials at symbols s [count, N]: [count, M]; symbols of errors are 0."""
    if run.order == 1:
        return torch.cat((torch.ones(len(s), 1), s[:, :own]), 1)
    return torch.stack([
        s[:, list(m)].prod(1) if m else torch.ones(len(s)) for m in run.algebra.monomials
    ], 1)


def symbols_of_set(run, forms):
    """(groups, number) of the symbols of the set; those of errors come after them."""
    first = next(iter(forms.values()))
    own = len(first.c) - 1 if run.order == 1 else run.domain.symbols
    groups, left = [], own
    for group in run.domain.groups:
        if left > 0:
            groups.append(group)
            left -= group.symbols
    return groups, own


def worst_escape(bounded, run, forms, inputs, count, generator=None):
    """(how far a value is out of its form at most, relative to its size, and where).

    Boxes and balls are looked at, at every node that depends on the perturbation.
    """
    leaves = [name for name in run.centres]
    groups, own = symbols_of_set(run, forms)
    points = draw(groups, count, generator)
    worst, where = -float("inf"), ""
    for s in points:
        m = monomials(run, s[None], own)[0]
        at = [
            torch.tensordot(m[: len(forms[name].c)], forms[name].c, 1) for name in leaves
        ]
        places = dict(zip(bounded.input_name, bounded.input_index, strict=True))
        x = [each.detach().as_subclass(torch.Tensor) for each in inputs]
        for name, value in zip(leaves, at, strict=True):
            x[places[name]] = value
        with torch.no_grad():
            auto_lirpa.HostBoundedModule.forward(bounded, *x)
        for name, form in forms.items():
            value = bounded[name].forward_value
            c, free = form.c[: len(m)], form.c[len(m):]
            off = value - torch.tensordot(m[: len(c)], c, 1)
            extra = free.abs().sum(0)
            size = value.abs().max() + form.c.abs().sum(0).max()
            out = (off.abs() - form.box - extra).max() / size
            if off.ndim > 1 and bool((form.ball >= 0).all()):
                stretch = 1.0 if form.stretch is None else form.stretch
                scaled = off / torch.where(torch.as_tensor(stretch) == 0, 1.0, stretch)
                ball = scaled.norm(dim=-1) - form.ball - extra.norm(dim=-1)
                out = max(out, ball.max() / size)
            if form.heads is not None:
                heads, others = (
                    each.unflatten(-1, (form.heads.shape[-1], -1)).norm(dim=-1)
                    for each in (off, extra)
                )
                out = max(out, (heads - form.heads - others).max() / size)
            if not out <= worst:
                worst, where = float(out), f"{name} {type(bounded[name]).__name__}"
    return worst, where


def worst_row(bounded, run, forms, inputs, count, generator=None):
    """How far |y - P(s)| exceeds the bound of the rows' errors through the adjoint, at most.

    Relative to the bound of all of y; the specification is the identity.
    """
    from lirpa_megatron.forward.method import _Rows

    final = bounded[bounded.final_name]
    form = forms[final.name]
    with torch.no_grad():
        rows = _Rows(run, final, form, None)
        c, forward = rows._through()
        infinite = torch.full_like(forward, float("inf"))
        error = rows._by_adjoint(run.domain.lower(c), infinite, forward.shape[1])
    groups, own = symbols_of_set(run, forms)
    worst = -float("inf")
    places = dict(zip(bounded.input_name, bounded.input_index, strict=True))
    for s in draw(groups, count, generator):
        m = monomials(run, s[None], own)[0]
        x = [each.detach().as_subclass(torch.Tensor) for each in inputs]
        for name in run.centres:
            x[places[name]] = torch.tensordot(m[: len(forms[name].c)], forms[name].c, 1)
        with torch.no_grad():
            auto_lirpa.HostBoundedModule.forward(bounded, *x)
        value = final.forward_value.flatten(1)
        shown, free = c[: len(m)], c[len(m):]
        off = (value - torch.tensordot(m[: len(shown)], shown, 1)).abs()
        if run.errors is None:  # otherwise the adjoint bounds those that are symbols, too
            off = off - free.abs().sum(0)
        worst = max(worst, float(((off - error) / (value.abs() + 1e-3)).max()))
    return worst, error, forward
