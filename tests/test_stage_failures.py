"""A rank of a pipeline that fails, disagrees or dies ends all stages with its message, soon."""

from __future__ import annotations

import os
import signal

import pytest
import stage_models
import torch
from ranks import RankPool, pool

SOON = 60.0
"""Seconds in which all ranks have to end, on a busy machine."""


def _ready(tp, pp=2):
    """A pool whose processes have started, so that a test's time is its own."""
    ranks = pool(tp * pp, tp, pp)
    ranks.run(stage_models.place)
    return ranks


def _bounded(rank, failing, where):
    """Bounds of a small network over stages; the failing rank raises somewhere on its way."""
    from lirpa_megatron import BoundedModule
    from lirpa_megatron.operators.elementwise.activations import BoundCurve

    torch.set_default_dtype(torch.float64)
    model = stage_models.mlp((4,), "tanh")
    x = stage_models.hidden()[:, 0, :5]
    cls = BoundCurve
    name = {"building": "__init__", "a pass": "bound_backward", "the clean value": "forward"}[where]
    original, calls = getattr(cls, name), []

    def fails(self, *args, **kwargs):
        calls.append(name)
        if where != "the clean value" or len(calls) > 2:
            raise ArithmeticError("a rank's own trouble")
        return original(self, *args, **kwargs)

    bad = rank == failing
    try:
        if bad:
            setattr(cls, name, fails)
        bounded = BoundedModule(model, x, {"check_live": where == "the clean value"})
        bounded.compute_bounds((stage_models.perturbed(x, 0.1),), method="CROWN")
    finally:
        if bad:
            setattr(cls, name, original)


def _fails_then_works(failing, where):
    import torch.distributed as dist

    try:
        _bounded(dist.get_rank(), failing, where)
        outcome = "nothing"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    # The channels are empty again: the next call finds nothing of this one.
    _bounded(dist.get_rank(), None, where)
    return outcome


@pytest.mark.parametrize("where", ["a pass", "building"])
@pytest.mark.parametrize(("tp", "pp", "failing"), [
    (1, 2, 0), (1, 2, 1), (2, 2, 3),
    *(pytest.param(2, 2, r, marks=pytest.mark.slow) for r in (0, 1, 2)),
])
def test_an_error_of_one_rank_ends_all_stages_and_the_next_call_works(tp, pp, failing, where):
    outcomes = _ready(tp, pp).outcomes(_fails_then_works, failing, where, timeout=SOON)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, (rank, outcome.message, outcome.trace)
        assert "a rank's own trouble" in outcome.value
        assert outcome.value.startswith("ArithmeticError") == (rank == failing)


def _fails_going_back(failing):
    """What a backward pass ends with where a gradient cannot be computed, and then another one."""
    import torch.distributed as dist

    from lirpa_megatron import BoundedModule

    torch.set_default_dtype(torch.float64)
    model = stage_models.mlp((4,), "tanh")
    x = stage_models.hidden()[:, 0, :5]
    bounded = BoundedModule(model, x, {"check_live": False})
    bounded.train()

    def fails(gradient):
        raise ArithmeticError("a gradient's own trouble")

    def loss():
        lower, _ = bounded.compute_bounds((stage_models.perturbed(x, 0.1),), method="CROWN")
        return lower.sum()

    hook = None
    if dist.get_rank() == failing:
        hook = next(model.parameters()).register_hook(fails)
    try:
        loss().backward()
        outcome = "nothing"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    if hook is not None:
        hook.remove()
    model.zero_grad()
    loss().backward()
    assert all(p.grad is not None for p in model.parameters())
    return outcome


@pytest.mark.parametrize(("tp", "failing"), [
    (1, 0), pytest.param(2, 1, marks=pytest.mark.slow),
])
def test_an_error_in_a_lower_stages_gradients_ends_all_stages(tp, failing):
    outcomes = _ready(tp).outcomes(_fails_going_back, failing, timeout=SOON)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, (rank, outcome.message, outcome.trace)
        assert "a gradient's own trouble" in outcome.value, (rank, outcome.value)


def _disagree(what):
    from lirpa_megatron import BoundedModule

    torch.set_default_dtype(torch.float64)
    stage, _ = stage_models.place()
    model = stage_models.mlp((4,))
    x = stage_models.hidden()[:, 0, :5]
    options = {"max_spec_rows": 3 + stage} if what == "options" else None
    bounded = BoundedModule(model, x, options)
    eps = 0.1 + 0.1 * stage if what == "eps" else 0.1
    if what == "center":
        x = x + stage
    C = torch.eye(4).expand(2, 4, 4)[:, : 3 + stage] if what == "C" else None
    method = "IBP" if what == "method" and stage else "CROWN"
    bounded.compute_bounds((stage_models.perturbed(x, eps),), C=C, method=method)


@pytest.mark.parametrize(("what", "named"), [
    ("eps", "eps of input 0"), ("center", "input 0"), ("C", "the specification C"),
    ("method", "a keyword argument"), ("options", "options"),
])
def test_stages_that_are_given_different_things_say_which(what, named):
    for outcome in _ready(1).outcomes(_disagree, what, timeout=SOON):
        assert outcome.error == "SPMDError", outcome
        assert named in outcome.message and "pipeline stages 0 and 1" in outcome.message


def _dies(dying):
    import torch.distributed as dist

    from lirpa_megatron.operators.elementwise.activations import BoundCurve

    original = BoundCurve.bound_backward

    def dies(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == dying:
        BoundCurve.bound_backward = dies
    try:
        _bounded(dist.get_rank(), None, "a pass")
    finally:
        BoundCurve.bound_backward = original


@pytest.mark.parametrize(("tp", "dying"), [
    (1, 0), *(pytest.param(tp, r, marks=pytest.mark.slow)
              for tp, r in [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]),
])
def test_a_rank_that_is_killed_ends_the_others(tp, dying):
    ranks = RankPool(2 * tp, tp, 2)
    try:
        ranks.run(stage_models.place)
        for rank, outcome in enumerate(ranks.outcomes(_dies, dying, timeout=SOON)):
            if rank == dying:
                assert outcome.error == "Died"
            else:
                assert outcome.error in ("StageError", "RemoteRankError"), (rank, outcome)
                assert "ended without a message" in outcome.message or "gone" in outcome.message
    finally:
        ranks.close()


def _refused(what):
    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm

    torch.set_default_dtype(torch.float64)
    x = stage_models.hidden()[:, 0, :5]
    bounded = BoundedModule(stage_models.mlp((4,)), x)
    border = bounded.final_name if bounded.below is None else bounded.stage_input.name
    given = {"return_A": {"return_A": True, "needed_A_dict": {}},
             "interm_bounds": {"interm_bounds": {border: (x, x)}},
             "reference_bounds": {"reference_bounds": {border: (x, x)}},
             "final_node_name": {"final_node_name": bounded.final_name}}
    bounded.compute_bounds((BoundedTensor(x, PerturbationLpNorm(eps=0.1)),), method="CROWN",
                           **given[what])


@pytest.mark.parametrize("what", [
    "return_A", "interm_bounds", "reference_bounds", "final_node_name",
])
def test_what_is_not_available_over_stages_is_refused_by_name(what):
    for outcome in _ready(1).outcomes(_refused, what, timeout=SOON):
        assert outcome.error in ("NotImplementedError", "StageError")
        assert what in outcome.message


def _out_of_place(case):
    import transformers

    from lirpa_megatron import BoundedModule

    torch.set_default_dtype(torch.float64)
    stage, _ = stage_models.place()
    x = stage_models.hidden()
    if case == "first twice":
        model = transformers.gpt(model={"post_process": False})
    else:
        model = stage_models.transformer("gpt", layernorm_epsilon=1e-5 * (1 + stage))
    BoundedModule(model, (x,))


@pytest.mark.parametrize(("case", "message"), [
    ("first twice", "its rank is stage 1 of 2"),
    ("other configs", "layernorm_epsilon"),
])
def test_stages_that_do_not_make_a_model_are_refused(case, message):
    for outcome in _ready(1).outcomes(_out_of_place, case, timeout=SOON):
        assert outcome.error in ("UserError", "SPMDError", "StageError"), outcome
        assert message in outcome.message
