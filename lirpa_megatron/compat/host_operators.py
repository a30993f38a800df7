"""Which of auto_LiRPA's own operators are used: those that have been attacked here and hold.

A graph may hold any operator of `operators.CUSTOM_OPS` (this package's) and, on values that depend
on the model's inputs, the host's operators of `HELD`. Each entry there is attacked by
tests/test_host_operators.py on both versions of the host, by every method that it names: random
points, corners, gradients. Anything else ends the construction with its name. What is computed of
parameters and constants alone has no bounds and may be anything that the host can run.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

import lirpa_megatron
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError


def _one_depends(node: Any, depends: list[bool]) -> str | None:
    return "of two values that both depend on the inputs" if sum(depends) > 1 else None


def _divided_by_constant(node: Any, depends: list[bool]) -> str | None:
    return "by a value that depends on the inputs" if depends[1] else None


def _plain_product(node: Any, depends: list[bool]) -> str | None:
    if depends[1:] != [False] * (len(depends) - 1):
        return "with a weight that depends on the inputs"
    given = {name: _attribute(node, name) for name in node.attributeNames()}
    usual = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    odd = [f"{name}={given[name]}" for name in usual if given.get(name, usual[name]) != usual[name]]
    return f"with {', '.join(odd)}" if odd else None


def _any(node: Any, depends: list[bool]) -> str | None:
    return None


HELD: dict[str, Callable[[Any, list[bool]], str | None]] = {
    "onnx::Add": _any,
    "onnx::Sub": _any,
    "onnx::Neg": _any,
    "onnx::Mul": _one_depends,
    "onnx::Div": _divided_by_constant,
    "onnx::Relu": _any,
    "onnx::Gemm": _plain_product,
    "onnx::MatMul": _plain_product,
    "onnx::Identity": _any,
    "onnx::Conv": _plain_product,
    "onnx::Tanh": _any,
    "onnx::Sigmoid": _any,
}
"""Operators of the host, for all of METHODS and both versions -> what is not held of them: called
with the graph's node and which of its inputs depend on the model's inputs, returns the reason."""

_REDUCES = "it adds up all dimensions, or the batch, and each sample has bounds of its own"
_ADVICE = {
    "onnx::Where": "write it with relu, clamp, maximum or minimum",
    "onnx::Greater": "write it with relu, clamp, maximum or minimum",
    "onnx::MaxPool": "use average pooling",
    "onnx::ReduceSum": _REDUCES,
    "onnx::ReduceMean": _REDUCES,
    "onnx::ConvTranspose": "use nn.Conv2d, or a linear layer",
    "onnx::LSTM": "recurrent layers are not supported, write out the steps",
    "onnx::GRU": "recurrent layers are not supported, write out the steps",
    "onnx::RNN": "recurrent layers are not supported, write out the steps",
    "onnx::Softmax": "megatron-core's attention has it, as one operator",
}
_TORCH = os.path.dirname(torch.__file__) + os.sep
_INSIDE = (
    os.path.dirname(lirpa_megatron.__file__) + os.sep,
    os.path.dirname(auto_lirpa.auto_LiRPA.__file__),
    *(_TORCH + name for name in (
        "overrides", "nn/functional", "jit", "_tensor", "nn/modules/module", "autograd", "_dynamo",
    )),
)
_NO_BOUNDS = ("onnx::Shape", "onnx::Size")
"""Of a value that depends on the inputs, but not themselves."""


@contextlib.contextmanager
def checked(
    called: Mapping[tuple[str, int], tuple[str, str]], inputs: Collection[int],
    known: Collection[str],
) -> Iterator[None]:
    """While a model is converted: refuses graphs with operators that are not on the list.

    Args:
        called: file and line of the model -> the torch function that it calls there,
            and the submodule that does.
        inputs: the numbers of the graph's inputs that may be perturbed.
        known: operators with a Bound class of this package or of the caller.
    """

    def check(graph: Any) -> None:
        depends = {x.unique(): i in inputs for i, x in enumerate(graph.inputs())}
        for node in graph.nodes():
            of_inputs = [depends.get(x.unique(), False) for x in node.inputs()]
            any_depends = any(of_inputs) and node.kind() not in _NO_BOUNDS
            for x in node.outputs():
                depends[x.unique()] = any_depends
            if any_depends and node.kind() not in known:
                _check_node(node, of_inputs, called)
        if not any(depends.get(x.unique(), False) for x in graph.outputs()):
            raise UserError("the model's output does not depend on an input that can be perturbed")

    with auto_lirpa.graphs_checked(check):
        yield


def _check_node(
    node: Any, depends: list[bool], called: Mapping[tuple[str, int], tuple[str, str]]
) -> None:
    kind = node.kind()
    why = HELD[kind](node, depends) if kind in HELD else ""
    if why is None:
        return
    if kind.endswith("::ATen"):
        kind = f"aten::{_attribute(node, 'operator')}"
    file, line = _line(node)
    function, module = called.get((file, line), ("", ""))
    what = f"torch.{function} ({kind})" if function else kind
    if file and not file.startswith(_TORCH):
        what += f" in {os.path.basename(file)}, line {line},"
    advice = _ADVICE.get(kind, "leave it out of the module that is bounded, or register an "
                               "operator for it (custom_ops)")
    scope = module or _scope(node)
    raise NotImplementedError(
        f"{scope + ': ' if scope else ''}{what} is not supported{' ' + why if why else ''}: "
        f"{advice}"
    )


def _attribute(node: Any, name: str) -> Any:
    import torch.onnx.symbolic_helper as symbolic_helper

    return symbolic_helper._node_get(node, name)


def _scope(node: Any) -> str:
    """The submodule's name: "A::/B::layers.0/C::act" -> "layers.0.act"."""
    names = [part.rpartition("::")[2] for part in node.scopeName().split("/")]
    return ".".join(name for name in names if name)


def _line(node: Any) -> tuple[str, int]:
    """File and line of the model's code behind a node; ("", 0) where the tracer does not know."""
    for file, line in re.findall(r"^(.*\.py)\((\d+)\): ", node.sourceRange(), re.MULTILINE):
        if not file.startswith(_INSIDE):
            return file, int(line)
    return "", 0
