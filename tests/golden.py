"""Writes bounds, A and gradients of the tests' models, or compares them bitwise with a file.

    python tests/golden.py write build/golden.pt      # before a change that is to change nothing
    python tests/golden.py compare build/golden.pt    # after it

The file holds float64 values at TP = 1, 2 and 4. It is good for one machine and one set of
libraries alone: other processors round sums in another order.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import network_cases as mlp
import torch
import transformer_cases as language
import transformers
from models import HOSTS_OWN, build, region, specification
from ranks import pool

from lirpa_megatron import BoundedModule, parallelize, perturb_tokens

SIZES = (1, 2, 4)
OPTIONS = ("default", "own rows in chunks", "weights move, in chunks", "every neuron")
METHODS = ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized")


def _numbers(value: Any) -> Any:
    """Tensors, at any depth, as numpy arrays."""
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().copy()
    if isinstance(value, dict):
        return {str(k): _numbers(v) for k, v in value.items() if k != "unstable_idx"}
    if isinstance(value, (list, tuple)):
        return [_numbers(v) for v in value]
    return value


def of_network(name: str, option: str) -> dict[str, Any]:
    """Bounds with A by every method, and gradients of CROWN's lower bound; on each rank."""
    torch.set_default_dtype(torch.float64)
    net = mlp.NETS[name]
    found = {}
    for where in ("linf", "box" if net.act_first else "l2"):
        model = parallelize(build(net).eval())
        options = {**mlp.OPTIONS[option], "optimize_bound_args": mlp.alpha_args("sgd")}
        x = region(net, where, batch=mlp.BATCH).bounded()
        module = BoundedModule(model, x.data, options, custom_ops=HOSTS_OWN)
        C = specification(mlp.BATCH, mlp.ROWS, net.outputs)
        for method in METHODS:
            # A is asked for where it is small: from the output to the input
            needed = {module.output_name[0]: {module.input_name[0]}}
            with_A = method != "IBP"
            extra = {"return_A": True, "needed_A_dict": needed} if with_A else {}
            found[where, method] = module.compute_bounds(x=(x,), C=C, method=method, **extra)
        module.train()  # in eval mode the host takes parameters for constants
        lower, _ = module.compute_bounds(x=(x,), C=C, method="CROWN", bound_upper=False)
        gradients = torch.autograd.grad(lower.sum(), tuple(model.parameters()), allow_unused=True)
        found[where, "gradients"] = gradients
    return _numbers(found)


def of_transformer(name: str) -> dict[str, Any]:
    """Bounds by every method, and gradients of CROWN-IBP's lower bound; on each rank."""
    torch.set_default_dtype(torch.float64)
    model, view, further = language.build_case(name, torch.float64)
    view.eval()
    inputs = perturb_tokens(view, transformers.tokens()[0], eps=0.01, **further)
    bounded = BoundedModule(view, inputs, bound_opts={"optimize_bound_args": language.ALPHA})
    found = {}
    sharded = bounded.sharded[bounded.final_name]  # alpha-CROWN refuses an output in shards
    for method in METHODS[:-1] if sharded else METHODS:
        with torch.set_grad_enabled(method == "CROWN-Optimized"):
            found[method] = bounded.compute_bounds(inputs, method=method)
    bounded.train()
    lower, upper = bounded.compute_bounds(inputs, method="CROWN-IBP")
    parameters = tuple(p for p in model.parameters() if p.requires_grad)
    found["gradients"] = torch.autograd.grad((upper - lower).sum(), parameters, allow_unused=True)
    return _numbers(found)


def golden() -> dict[str, list[Any]]:
    """What is asked -> the values of each rank."""
    values = {}
    for size in SIZES:
        for name in language.CASES:
            values[f"TP={size}, {name}"] = pool(size).run(of_transformer, name)
        for name in mlp.NETS:
            for option in OPTIONS:
                values[f"TP={size}, {name}, {option}"] = pool(size).run(of_network, name, option)
        print(f"TP={size}: {len(values)} values so far", file=sys.stderr, flush=True)
    return values


def differences(old: Any, new: Any, where: str) -> list[str]:
    """The places where two values are not bitwise equal."""
    if isinstance(old, dict):
        if old.keys() != new.keys():
            return [f"{where}: {sorted(old.keys() ^ new.keys())} on one side alone"]
        return [d for k in old for d in differences(old[k], new[k], f"{where}, {k}")]
    if isinstance(old, list):
        if len(old) != len(new):
            return [f"{where}: {len(old)} and {len(new)} parts"]
        return [d for i, pair in enumerate(zip(old, new, strict=True))
                for d in differences(*pair, f"{where}[{i}]")]
    if hasattr(old, "tobytes"):
        if old.shape != new.shape:
            return [f"{where}: shapes {old.shape} and {new.shape}"]
        if old.tobytes() != new.tobytes():
            return [f"{where}: differ by {abs(old - new).max():.3g} of {abs(old).max():.3g}"]
        return []
    return [] if old == new else [f"{where}: {old} and {new}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    values = golden()
    if args.action == "write":
        args.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, args.file)
        return
    old = torch.load(args.file, weights_only=False)  # written by this script
    found = differences(old, values, "")
    print("\n".join(found[:40]) or f"{len(values)} values are bitwise equal")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    import golden as this  # ranks look functions up by the name of their module

    this.main()
