"""torch's own functions reach this package's operators when a model is converted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lirpa_megatron import BoundedModule
from lirpa_megatron.adapters.plain import exported
from lirpa_megatron.compat import auto_lirpa


class Calls(nn.Module):
    """A module that is one function of x."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def operators(function, x: torch.Tensor | None = None) -> list[str]:
    """Classes of the operators that the bound graph of a function has, in order."""
    x = torch.rand(2, 3) if x is None else x
    nodes = BoundedModule(Calls(function), x).named_nodes().values()
    return [type(node).__name__ for node in nodes if node.inputs]


def test_functions_of_torch_reach_our_operators_through_any_call():
    assert operators(F.gelu) == ["BoundGeluErf"]
    assert operators(lambda x: F.silu(F.gelu(x, approximate="tanh"))) == [
        "BoundGeluTanh", "BoundSilu",
    ]
    assert operators(lambda x: F.silu(x + 0, inplace=True))[-1] == "BoundSilu"


def test_the_exporter_is_as_it_was_after_a_conversion_and_after_a_failed_one():
    registry, opset = auto_lirpa.symbolic_registry()

    def mine(*_):
        raise AssertionError

    registry.register("aten::silu", opset, mine, custom=True)
    try:
        before = {name: registry.get_function_group(name).get(opset)
                  for name in ("aten::gelu", "aten::silu")}
        operators(F.silu)
        try:
            with exported.own_operators():
                raise KeyError
        except KeyError:
            pass
        for name, function in before.items():
            assert registry.get_function_group(name).get(opset) is function
        assert before["aten::silu"] is mine
    finally:
        registry.unregister("aten::silu", opset)


def test_an_error_in_a_symbolic_function_reaches_the_caller():
    import pytest

    from lirpa_megatron.errors import UserError

    @exported.symbolic("aten::tan")
    def _tan(g, usual, x):
        exported.number(x, "the argument of tan")

    try:
        with pytest.raises(UserError, match="the argument of tan must be a number"):
            operators(torch.tan)
    finally:
        del exported.SYMBOLS["aten::tan"]
