"""Forward methods at GPT-2 small's shape: seconds, memory and radii of next-token margins.

    python benchmarks/gpt2_shape.py [--sets segment words ball] [--orders 1 3 8] [--modes tp1 tp2]
        [--layers 12] [--tokens 16] [--rows 1] [--refined 0] [--kept N] [--steps 12]
        [--between 1e-7 4] [--no-attack] [--limit 1800] [--json FILE]

12 layers, hidden 768, 12 heads, 50304 words (GPT-2's 50257, padded to share out), learned
positions, tied embeddings, tanh GELU; weights drawn as GPT-2's are at initialisation; float32. The
margins are those of the most likely next word against all others. What is perturbed is the word
before the last:

segment   x + r t D, |t| <= 1, D a random direction as long as the word's embedding
words     its embedding moved towards those of 7 random words, by the share r of the way
ball      an L2 ball of the radius r |embedding| around its embedding

Every mode runs in processes of its own, one thread each, and bisects the logarithm of the radius
from 1e-7 to 4, or `--between` others (0: the first is not proved);
'attacked' is the smallest radius, of a grid, at which a point found by gradient steps has another
next word. Seconds are the processor's. Memory is the peak above what the model takes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

RANKS = {"tp1": 1, "tp2": 2, "tp4": 4}
MOST = {"segment": 8, "words": 3, "ball": 1}
"""Up to which degree a set has been tried."""
VOCABULARY, HIDDEN, HEADS = 50304, 768, 12


def model_of(layers: int, length: int):
    """The rank's part of the model."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformer_models import GELU

    from lirpa_megatron.parallel import runtime

    config = TransformerConfig(
        num_layers=layers, hidden_size=HIDDEN, ffn_hidden_size=4 * HIDDEN,
        num_attention_heads=HEADS, tensor_model_parallel_size=runtime.tp_size(),
        params_dtype=torch.float32, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False,
        apply_rope_fusion=False, attention_softmax_in_fp32=True, activation_func=GELU,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=length,
        parallel_output=False, share_embeddings_and_output_weights=True,
    ).eval().requires_grad_(False)
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "layernorm" in name or name.endswith("bias"):
            parameter.fill_(float("layernorm" in name and name.endswith("weight")))
            continue
        shape, dim, parts = list(parameter.shape), 0, 1
        if getattr(parameter, "tensor_model_parallel", False):
            dim, parts = parameter.partition_dim, runtime.tp_size()
            shape[dim] *= parts
        joins = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = 0.01 if "position" in name else 0.02 / (math.sqrt(2 * layers) if joins else 1)
        whole = std * torch.randn(*shape, generator=drawn)
        parameter.copy_(whole.chunk(parts, dim)[runtime.tp_rank() if parts > 1 else 0])
    return model


class Sets:
    """The set of radius r, and points of it."""

    def __init__(self, kind: str, model, ids) -> None:
        import torch

        from lirpa_megatron import BoundedTensor
        from lirpa_megatron.adapters.embeddings import embed
        from lirpa_megatron.problem import perturbations

        self.kind, self.wrap, self.sets = kind, BoundedTensor, perturbations
        self.x = embed(model, ids).detach()
        self.place = ids.shape[1] - 2
        own = self.x[0, self.place]
        drawn = torch.Generator().manual_seed(2)
        if kind == "segment":
            D = torch.randn(1, HIDDEN, generator=drawn)
            self.ends = own.norm() * D / D.norm()
        elif kind == "words":
            changed = ids.repeat(7, 1)
            changed[:, self.place] = torch.randint(0, VOCABULARY, (7,), generator=drawn)
            self.ends = embed(model, changed).detach()[:, self.place] - own
        self.length = float(own.norm())

    def bounded(self, r: float):
        import torch

        x = self.x
        if self.kind == "segment":
            D = torch.zeros(1, 1, *x.shape[1:])
            D[0, 0, self.place] = r * self.ends[0]
            return self.wrap(x, self.sets.PerturbationSegments(x, D))
        if self.kind == "words":
            vertices = x.unsqueeze(2).repeat(1, 1, 1 + len(self.ends), 1)
            vertices[0, self.place, 1:] += r * self.ends
            return self.wrap(x, self.sets.PerturbationHull(vertices))
        radii = torch.zeros(x.shape[:2])
        radii[0, self.place] = r * self.length
        return self.wrap(x, self.sets.PerturbationPositions(x, radii, 2.0, joint=False))

    def point(self, r: float, free):
        """The point that free numbers stand for."""
        import torch

        if self.kind == "segment":
            moved = r * torch.tanh(free[:1]) @ self.ends
        elif self.kind == "words":
            moved = r * torch.softmax(free[: len(self.ends) + 1], 0)[1:] @ self.ends
        else:
            moved = r * self.length * free / free.norm().clamp(min=1)
        place = torch.tensor([0]), torch.tensor([self.place])
        return self.x.index_put(place, self.x[0, self.place] + moved)


def _attacked(sets: Sets, logits_of, target: int) -> float:
    """The smallest radius of a grid at which gradient steps find another next word."""
    import torch

    for r in [2.0**k for k in range(-6, 5)]:
        for seed in range(2):
            drawn = torch.Generator().manual_seed(seed)
            free = torch.randn(HIDDEN, generator=drawn)
            free = (free / free.norm() if sets.kind == "ball" else 2 * free).requires_grad_()
            step = torch.optim.Adam([free], lr=0.02 if sets.kind == "ball" else 0.5)
            for _ in range(12):
                logits = logits_of(sets.point(r, free))[0]
                own = logits[target]
                others = logits.index_fill(0, torch.tensor([target]), -math.inf).amax()
                if bool(others > own):
                    return r
                step.zero_grad()
                (own - others).backward()
                step.step()
    return math.inf


def _one(task: dict) -> dict:
    """Runs in a process of its own (one per rank)."""
    import torch
    from memory import PeakMemory

    from lirpa_megatron import BoundedModule, at_position, next_token_margins, smallest_margin
    from lirpa_megatron.parallel import runtime

    torch.set_num_threads(1)
    with runtime.session(), torch.no_grad():
        model = model_of(task["layers"], task["tokens"])
        drawn = torch.Generator().manual_seed(3)
        ids = torch.randint(0, VOCABULARY, (1, task["tokens"]), generator=drawn)
        view = at_position(model, -1)
        sets = Sets(task["set"], model, ids)
        memory = PeakMemory()
        logits = BoundedModule(view, (sets.x,))
        target = logits.forward(sets.x).argmax(-1)
        options = {"order": task["order"], "adjoint_rows": task["rows"],
                   "refined_rows": task["refined"], "kept_errors": task["kept"]}
        bounded = BoundedModule(next_token_margins(model), (sets.x, target), options)
        seconds = []

        def proves(r: float) -> bool:
            begin = time.process_time()
            inputs = (sets.bounded(r), target)
            lower, _ = bounded.compute_bounds(inputs, method="forward", bound_upper=False)
            least = float(smallest_margin(lower, target).min())
            seconds.append(time.process_time() - begin)
            return least > 0

        (low, high), found = map(math.log, task["between"]), 0.0
        proves(1e-3)  # what the first call prepares (singular values) is left out
        first, = seconds
        seconds.clear()
        if proves(math.exp(low)):
            found = math.exp(low)
        for _ in range(task["steps"] if found else 0):
            middle = (low + high) / 2
            if proves(math.exp(middle)):
                low, found = middle, math.exp(middle)
            else:
                high = middle
        peak, attacked = memory.stop(), None
        if runtime.tp_size() == 1 and task["attack"]:
            with torch.enable_grad():
                attacked = _attacked(sets, logits.forward, int(target))
    return {"radius": found, "attacked": attacked, "mib": peak, "first": first,
            "weights": sum(p.numel() * 4 for p in model.parameters()) / 2**20,
            "seconds": sum(seconds) / len(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=MOST, default=list(MOST))
    parser.add_argument("--orders", nargs="+", type=int, default=[1, 3, 8])
    parser.add_argument("--modes", nargs="+", choices=RANKS, default=["tp1", "tp2"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1, help="margins with errors by the adjoint")
    parser.add_argument("--refined", type=int, default=0, help="the option `refined_rows`")
    parser.add_argument("--kept", type=int, help="the option `kept_errors`, of order 1")
    parser.add_argument("--steps", type=int, default=12, help="of bisection")
    parser.add_argument("--between", nargs=2, type=float, default=[1e-7, 4.0])
    parser.add_argument("--no-attack", action="store_true")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one mode")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from workers import launch

    print("| set | order | mode | s a bound | first | MiB | model MiB | radius | attacked |\n"
          "|---|---|---|---|---|---|---|---|---|")
    figures = {}
    for kind in options.sets:
        for order in options.orders:
            if order > MOST[kind]:
                continue
            for mode in options.modes:
                task = {"set": kind, "order": order, "layers": options.layers,
                        "tokens": options.tokens, "steps": options.steps, "rows": options.rows,
                        "refined": options.refined, "kept": options.kept,
                        "attack": not options.no_attack, "between": options.between}
                ranks = launch(__file__, task, RANKS[mode], options.limit, None)
                if ranks is None:
                    print(f"| {kind} | {order} | {mode} | more than {options.limit:g} s |")
                    continue
                x = max(ranks, key=lambda x: x["mib"])
                attacked = "" if x["attacked"] is None else f"{x['attacked']:.3g}"
                print(f"| {kind} | {order} | {mode} | {x['seconds']:.1f} | {x['first']:.1f} "
                      f"| {x['mib']:.0f} | {x['weights']:.0f} | {x['radius']:.3g} | {attacked} |",
                      flush=True)
                figures[f"{kind} {order} {mode}"] = ranks
                if options.json:
                    options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _one)
