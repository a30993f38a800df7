"""The live model is what is compared with: no bounds of another function, nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import math
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from ranks import pool
from torch import nn

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    at_position,
    embed,
    from_layer,
    next_token_margins,
    parallelize,
    perturb_tokens,
)
from lirpa_megatron.errors import LiveModelError


def _x():
    return torch.linspace(-1, 1, 12).view(2, 6)


def _ball(eps=0.1, x=None):
    x = _x() if x is None else x
    return BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=eps))


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@contextlib.contextmanager
def _patched(cls, change):
    """A class whose forward is another one for a block, which says that it is the class's own."""
    forward = cls.forward

    def other(self, *args, **kwargs):
        return change(self, forward(self, *args, **kwargs))

    cls.forward = types.FunctionType(
        other.__code__, {"__name__": forward.__module__}, closure=other.__closure__
    )
    try:
        yield
    finally:
        cls.forward = forward


# ------------------------------------------------------------------------ plain networks


def test_a_patched_class_is_found_and_the_first_module_that_differs_is_named_with_both_values():
    net = _net().eval()
    with _patched(nn.Linear, lambda self, y: y * 1.001 if self is net[2] else y):
        with pytest.raises(LiveModelError) as caught:
            BoundedModule(net, _x())
    text = str(caught.value)
    assert text.startswith("2: the model itself computes ") and "its graph of bounds" in text
    live, graph = (float(text.split(part)[1].split()[0].rstrip(";")) for part in (
        "itself computes", "graph of bounds"
    ))
    assert abs(live / graph - 1.001) < 1e-4 and "\n" not in text


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.one(x) if bool(x.sum() > -1) else self.other(x)


class Reading(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(6, 3), how
        self.register_buffer("limit", torch.tensor(5.0))

    def forward(self, x):
        y = self.linear(x)
        if self.how == "a number":
            return y * max(1.0, y.max().item())
        if self.how == "equality":
            return y if not torch.equal(y, y + 1) else y * 2
        return y * 2 if self.limit > 4 and x.shape[0] == 2 else y  # of a constant and a shape


@pytest.mark.parametrize("how", ["a branch", "a number", "equality"])
def test_values_of_the_input_that_decide_what_is_computed_are_refused_with_their_line(how):
    model = Branches() if how == "a branch" else Reading(how)
    with pytest.raises(LiveModelError, match=r"values of the input \(\w+ at .*\.py:\d+ \(forward"):
        BoundedModule(model.eval(), _x())


def test_constants_and_shapes_may_decide():
    model = Reading("a constant").eval()
    lower, upper = BoundedModule(model, _x()).compute_bounds(x=(_ball(),), method="IBP")
    assert (lower <= model(_x())).all() and (model(_x()) <= upper).all()


def test_a_branch_that_is_not_looked_for_is_found_where_its_values_differ():
    bounded = BoundedModule(Branches().eval(), _x(), {"check_live": False})
    bounded.compute_bounds(x=(_ball(x=_x() - 5),), method="IBP")  # nobody looks


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.factor = nn.Linear(6, 3), 2.0
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        return self.linear(x) * self.factor + self.shift


@pytest.mark.parametrize("change", ["number", "buffer", "parameter", "own class"])
def test_a_model_that_was_changed_after_building_is_found(change):
    model = Scaled().eval()
    bounded = BoundedModule(model, _x())
    bounded.compute_bounds(x=(_ball(),), method="IBP")
    if change == "number":
        model.factor = 3.0
    elif change == "buffer":
        model.shift = torch.zeros(3)
    elif change == "parameter":
        model.linear.weight = nn.Parameter(torch.zeros(3, 6))
    else:
        model.__class__ = type("Other", (Scaled,), {"forward": lambda self, x: self.linear(x)})
    with pytest.raises(LiveModelError):
        bounded.compute_bounds(x=(_ball(),), method="IBP")


def test_new_values_of_the_same_parameters_are_not_a_change():
    model = _net().eval()
    bounded = BoundedModule(model, _x())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    lower, upper = bounded.compute_bounds(x=(_ball(),), method="CROWN")
    assert (lower <= model(_x())).all() and (model(_x()) <= upper).all()


class Counting(nn.Module):
    """Notes on itself, counts, draws numbers, and says whether gradients are recorded."""

    def __init__(self):
        super().__init__()
        self.net, self.calls, self.seen = _net(), 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        if not torch.jit.is_tracing():
            self.calls += 1
            self.note = "there"
            self.total += 1
            torch.rand(3)
            self.seen.append(torch.is_grad_enabled())
        return self.net(x)


def test_one_forward_pass_is_run_and_leaves_nothing_behind():
    model = Counting().eval()
    bounded = BoundedModule(model, _x())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls, runs = model.calls, bounded.live.runs
    model.seen.clear()
    state = torch.get_rng_state()
    note = getattr(model, "note", None)
    bounded.compute_bounds(x=(_ball(),), method="CROWN")
    assert bounded.live.runs == runs + 1 and model.seen == [False]
    assert bounded.live.seconds > 0
    assert model.calls == calls and getattr(model, "note", None) == note
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batch_norms_counters_and_modes_are_as_before():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model.eval()
    bounded = BoundedModule(model, _x())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()  # bounded is the function that it had when it was built
    model[0].eval()
    bounded.compute_bounds(x=(_ball(),), method="IBP")
    assert [m.training for m in model] == [False, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_in_training_only_the_first_of_so_many_calls_is_looked_at():
    bounded = BoundedModule(_net(), _x(), {"check_live_every": 3}).train()
    runs = [bounded.live.runs]
    for _ in range(4):
        bounded.compute_bounds(x=(_ball(),), method="CROWN-IBP")
        runs.append(bounded.live.runs)
    assert [b - a for a, b in zip(runs, runs[1:], strict=False)] == [1, 0, 0, 1]
    with torch.no_grad():
        bounded.compute_bounds(x=(_ball(),), method="CROWN-IBP")
    assert bounded.live.runs == runs[-1] + 1


def test_method_auto_compares_once():
    bounded = BoundedModule(_net().eval(), _x())
    runs = bounded.live.runs
    bounded.compute_bounds(x=(_ball(5.0),), method="auto")
    assert bounded.live.runs == runs + 1
    bounded.compute_bounds(x=(_ball(5.0),), method="IBP")
    assert bounded.live.runs == runs + 2


def test_the_check_is_switched_off_by_name():
    net = _net().eval()
    with _patched(nn.Linear, lambda self, y: y * 2 if self is net[2] else y):
        bounded = BoundedModule(net, _x(), {"check_live": False})
        bounded.compute_bounds(x=(_ball(),), method="IBP")
    assert bounded.live is None
    with pytest.raises(ValueError, match="check_live"):
        BoundedModule(net, _x(), {"check_live": "no"})
    with pytest.raises(ValueError, match="check_live_every"):
        BoundedModule(net, _x(), {"check_live_every": 0})


class Cancelling(nn.Module):
    """float32 rounding of 6e-5 in outputs of about 1: (1e3 + a) - (1e3 + b)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)
        with torch.no_grad():
            self.a.bias.add_(1e3)
            self.b.bias.add_(1e3)

    def forward(self, x):
        if torch.jit.is_tracing():
            return self.a(x) - self.b(x)
        return self.a.bias - self.b.bias + F.linear(x, self.a.weight) - F.linear(x, self.b.weight)


def test_rounding_that_cancellation_makes_large_is_told_from_another_function():
    torch.manual_seed(0)
    model = Cancelling().eval()
    bounded = BoundedModule(model, _x(), {"check_live": True})
    assert bounded.live.runs == 2 and bounded.live.difference > 1e-5  # the second in float64
    with torch.no_grad():
        model.a.weight[0, 0] += 1e-3  # a change of that size in the function itself is seen
    kept = model.a.weight
    model.a.weight = nn.Parameter(kept.detach().clone())
    with pytest.raises(LiveModelError, match=r"a: weight was replaced"):
        bounded.compute_bounds(x=(_ball(),), method="IBP")


def test_a_forward_that_raises_is_one_clear_line():
    net = _net().eval()
    bounded = BoundedModule(net, _x())

    def broken(self, y):
        raise ZeroDivisionError("no\nsuch luck")

    with _patched(nn.Linear, broken), pytest.raises(LiveModelError) as caught:
        bounded.compute_bounds(x=(_ball(),), method="IBP")
    assert "ZeroDivisionError" in str(caught.value) and "check_live=False" in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------ Megatron's models


def _margins(model, **options):
    ids = transformers.tokens()[0]
    view = next_token_margins(model)
    inputs = (*perturb_tokens(view, ids, eps=0.01), ids[:, 0])
    bounded = BoundedModule(view, inputs, options)
    return bounded, inputs


def _gained(factor, *which):
    """Multiplies what a module of Megatron returns."""

    def change(self, y):
        if which and self not in which:
            return y
        return (y[0] * factor, *y[1:]) if isinstance(y, tuple) else y * factor

    return change


def _patched_classes():
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP

    model, found = transformers.gpt(torch.float32), {}
    layers = model.decoder.layers
    cases = {
        "mlp": (MLP, layers[1].mlp), "attention": (SelfAttention, layers[0].self_attention),
        "linear": (ColumnParallelLinear, layers[1].mlp.linear_fc1),
        "norm": (nn.LayerNorm, layers[1].pre_mlp_layernorm),
        "output": (ColumnParallelLinear, model.output_layer),
        "words": (VocabParallelEmbedding, model.embedding.word_embeddings),
    }
    for name, (cls, module) in cases.items():
        with _patched(cls, _gained(1.001, module)):
            try:
                found[name] = str(_margins(model)[0].live.difference)
            except LiveModelError as error:
                found[name] = str(error)
    return found


def test_a_patched_class_of_megatron_is_found_in_the_first_module_that_differs():
    found = pool(1).run(_patched_classes)[0]
    names = {
        "mlp": "model.decoder.layers.1.mlp:", "attention": "model.decoder.layers.0.self_attention:",
        "linear": "model.decoder.layers.1.mlp.linear_fc1:",
        "norm": "model.decoder.layers.1.pre_mlp_layernorm:",
        "output": "TokenMargins: the model itself", "words": "embedding:",
    }
    for case, name in names.items():
        assert name in found[case] and "the model itself computes" in found[case], found[case]


def _changed_later():
    model = transformers.llama(torch.float32)
    attention, mlp = model.decoder.layers[1].self_attention, model.decoder.layers[0].mlp
    changes = {
        "model.decoder.final_layernorm: eps changed from 1e-05 to 1e-06": (
            model.decoder.final_layernorm, "eps", 1e-6
        ),
        "model.decoder.layers.1.self_attention: scale changed": (
            attention.core_attention, "softmax_scale", 0.3
        ),
        "model.decoder.layers.0.mlp: kind changed from 'silu' to 'gelu'": (
            model.config, "activation_func", F.gelu
        ),
        "model.decoder.layers.0.mlp.linear_fc2: weight was replaced": (
            mlp.linear_fc2, "weight", nn.Parameter(mlp.linear_fc2.weight.detach().clone())
        ),
        "model.decoder.layers.0.self_attention: rotary_interleaved changed": (
            model.config, "rotary_interleaved", True
        ),
        "model.rotary_pos_emb: the model itself": (
            model.rotary_pos_emb, "inv_freq", model.rotary_pos_emb.inv_freq * 0.9
        ),
        "softmax_type='learnable'": (model.config, "softmax_type", "learnable"),
    }
    bounded, inputs = _margins(model)
    found = {}
    for expected, (owner, name, value) in changes.items():
        kept = getattr(owner, name)
        setattr(owner, name, value)
        try:
            found[expected] = str(bounded.compute_bounds(inputs, method="IBP"))
        except (LiveModelError, NotImplementedError) as error:
            found[expected] = str(error)
        setattr(owner, name, kept)
    bounded.compute_bounds(inputs, method="IBP")
    return found


def test_what_is_changed_in_a_model_after_building_is_named_or_found_by_its_values():
    for expected, message in pool(1).run(_changed_later)[0].items():
        assert expected in message


def _half():
    model = transformers.gpt(torch.float32, bf16=True, params_dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    kept = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    bounded, inputs = _margins(model)
    bounded.compute_bounds(inputs, method="IBP")
    for name, (parameter, address) in kept.items():
        assert parameter.dtype == torch.bfloat16 and parameter.data_ptr() == address, name
    softmax = model.decoder.layers[0].self_attention.core_attention.scale_mask_softmax
    assert softmax.input_in_bf16 and softmax.input_in_float16
    from megatron.core.transformer.mlp import MLP

    with _patched(MLP, _gained(1.001)):  # less than bfloat16 rounds
        try:
            return bounded.live.difference, str(bounded.compute_bounds(inputs, method="IBP"))
        except LiveModelError as error:
            return bounded.live.difference, str(error)


def test_half_precision_hides_nothing_and_the_parameters_are_back_afterwards():
    difference, message = pool(1).run(_half)[0]
    assert difference < 1e-5 and "model.decoder.layers.0.mlp: the model itself" in message


def _partial():
    from lirpa_megatron.adapters.traceable import traceable

    found = []
    for function in (
        functools.partial(F.gelu, approximate="tanh"), functools.partial(F.leaky_relu),
        lambda x: F.gelu(x) * 2,
    ):
        try:
            traceable(transformers.gpt(torch.float32, activation_func=function))
            found.append("traced")
        except NotImplementedError as error:
            found.append(str(error))
    return found


def test_activations_of_unknown_functions_are_refused():
    tanh, other, scaled = pool(1).run(_partial)[0]
    assert tanh == "traced" and "activation function" in other and "activation function" in scaled


def _entered_later(patched):
    from megatron.core.transformer.mlp import MLP

    model = transformers.gpt(torch.float32)
    view = at_position(from_layer(model, 1), -1)
    block = contextlib.nullcontext()
    if patched:
        block = _patched(MLP, _gained(1.01, model.decoder.layers[0].mlp))
    with block:
        inputs = perturb_tokens(view, transformers.tokens()[0], eps=0.01)
    return BoundedModule(view, inputs).compute_bounds(inputs, method="IBP")[0]


def test_hidden_states_that_enter_a_later_layer_are_compared_with_the_live_models():
    right, wrong = (pool(1).outcomes(_entered_later, patched)[0] for patched in (False, True))
    assert right.error is None
    assert wrong.error == "LiveModelError" and "layer 1" in wrong.message


# ----------------------------------------------------------------------------- several ranks


def _sequence_parallel(model):
    """What `sequence_parallel` makes of the modules when they are built (without apex)."""
    model.config.sequence_parallel = True
    for module in model.modules():
        if hasattr(module, "sequence_parallel"):
            module.sequence_parallel = True


def _in_sequence():
    model, found = transformers.gpt(torch.float32), []
    for sequence in (False, True):
        if sequence:
            _sequence_parallel(model)
        bounded, inputs = _margins(model)
        found.append(bounded.compute_bounds(inputs, method="IBP")[0])
    block = model.decoder
    hidden = embed(model, transformers.tokens()[0]).detach()
    for part in (block, block.layers[0], block.layers[0].self_attention, block.layers[0].mlp):
        BoundedModule(part, hidden).compute_bounds((_ball(x=hidden),), method="IBP")
    return (found[0] - found[1]).abs().max().item()


def test_sequence_parallel_models_are_compared_on_each_ranks_positions():
    assert max(pool(2).run(_in_sequence)) == 0


def _wrong_on_one_rank(what):
    import torch.distributed as dist
    from megatron.core.transformer.mlp import MLP

    from lirpa_megatron.parallel import runtime

    model = transformers.gpt(torch.float32, model={"parallel_output": True})
    if what == "sequence":  # torch's norms refuse to be built so, and Megatron's modules share it
        _sequence_parallel(model)
    bounded, inputs = _margins(model)
    bounded.compute_bounds(inputs, method="IBP")

    def change(self, y):
        if runtime.tp_rank() == 1 and self is model.decoder.layers[1].mlp:
            if what == "raises":
                raise MemoryError("rank 1 is out of memory")
            if what == "communicates":
                dist.all_reduce(torch.ones(1), group=runtime.tp_group())
            return (y[0] * 2, y[1])
        return y

    with _patched(MLP, change):
        bounded.compute_bounds(inputs, method="IBP")


@pytest.mark.parametrize("what", ["differs", "sequence", "raises", "communicates"])
def test_a_live_model_that_is_wrong_on_one_rank_alone_ends_all_ranks_with_the_error(what):
    outcomes = pool(2).outcomes(_wrong_on_one_rank, what, timeout=60)
    messages = [outcome.message for outcome in outcomes]
    if what == "raises":
        assert all("MemoryError" in message for message in messages), messages
    elif what == "communicates":
        assert [o.error for o in outcomes] == ["SPMDError"] * 2
        assert all("allreduce" in message for message in messages), messages
    else:
        assert [o.error for o in outcomes] == ["LiveModelError"] * 2, messages
        assert all("model.decoder.layers.1.mlp: the model itself" in m for m in messages), messages


def _parallelized():
    from lirpa_megatron.adapters.parallelize import ColumnLinear

    net = parallelize(_net().eval())
    bounded = BoundedModule(net, _x())
    bounded.compute_bounds(x=(_ball(),), method="CROWN")
    with _patched(ColumnLinear, _gained(1.001)):
        bounded.compute_bounds(x=(_ball(),), method="CROWN")


def test_a_parallelized_network_is_compared_too():
    for outcome in pool(2).outcomes(_parallelized, timeout=60):
        assert outcome.error == "LiveModelError" and "0: the model itself" in outcome.message


def _embedding_on_one_rank():
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    from lirpa_megatron.parallel import runtime

    model, ids = transformers.gpt(torch.float32), transformers.tokens()[0]
    embed(model, ids)
    with _patched(VocabParallelEmbedding, _gained(2.0 if runtime.tp_rank() else 1.0)):
        embed(model, ids)


def test_an_embedding_that_is_wrong_on_one_rank_ends_all_ranks():
    for outcome in pool(2).outcomes(_embedding_on_one_rank, timeout=60):
        assert outcome.error == "LiveModelError" and "embedding: the model" in outcome.message
