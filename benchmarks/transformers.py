"""Time and memory of CROWN for transformers: plain auto_LiRPA against this package at TP=1, 2, 4.

    python benchmarks/transformers.py [--layers 1 3 6] [--sequence 8 16] [--modes plain tp1 tp2 tp4]
        [--method CROWN] [--word N] [--quick] [--profile] [--moves auto] [--limit 600]
        [--device cpu] [--auto-lirpa FOLDER] [--json FILE]

A GPTModel of megatron-core (hidden 128, FFN 512, 4 heads, tanh GELU, random weights): margins of
the next token at the last position over eight others, every embedding (or that of one word)
perturbed by eps in L-inf,
all intermediate bounds by CROWN. 'plain' is the same function in torch, unsharded, and bounded by
auto_LiRPA 0.7.1 with its defaults (0.3 cannot build it).

Every mode runs in processes of its own, one thread each, which end at the limit. With more ranks
than free cores wall time says little: the processor time of the worst rank is printed beside it.
Memory is the most that the worst rank has allocated, above what it is after the imports (ours: and
the bounds of a tiny model; see `memory`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import kinds

MODES = {"plain": 1, "tp1": 1, "tp2": 2, "tp4": 4}
"""Mode -> processes."""
HIDDEN, FFN, HEADS, VOCABULARY, TARGET, AGAINST = 128, 512, 4, 64, 8, range(8)


def _plain(task):
    """The network, the same for every mode, its head the margins' differences of rows."""
    import torch
    from transformer_models import Plain

    torch.manual_seed(0)
    length = task["sequence"]
    plain = Plain(task["layers"], HIDDEN, FFN, HEADS, VOCABULARY, length - 1, length).eval()
    with torch.no_grad():
        plain.head.bias.zero_()
    return plain


def _ours(plain, x, task):
    """(bounded module, its inputs without the perturbed one)."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from transformer_models import config, fill

    from lirpa_megatron import BoundedModule, next_token_margins
    from lirpa_megatron.parallel import runtime

    model = GPTModel(
        config=config(plain), transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY, max_sequence_length=task["sequence"], position_embedding_type="none",
        share_embeddings_and_output_weights=False, parallel_output=False,
    ).eval()
    fill(model.decoder, plain)
    with torch.no_grad():
        parts = plain.head.weight.chunk(runtime.tp_size())
        model.output_layer.weight.copy_(parts[runtime.tp_rank()])
    targets = torch.full((len(x),), TARGET)
    margins = next_token_margins(model, against=AGAINST)
    targets, margins = targets.to(x.device), margins.to(x.device)
    options = {"moves": task.get("moves", "auto")}
    return BoundedModule(margins, (x, targets), options), (targets,)


def _build(task):
    """(bounded module, function that bounds)."""
    import torch
    from torch import nn
    from transformer_models import bound_plainly

    from lirpa_megatron import BoundedTensor, PerturbationLpNorm

    plain = _plain(task)
    x = torch.randn(1, task["sequence"], HIDDEN, generator=torch.Generator().manual_seed(9))
    x = x.to(task["device"])
    if task["mode"] == "plain":
        weight = plain.head.weight.detach()
        plain.head = nn.Linear(HIDDEN, len(AGAINST), bias=False)
        plain.head.weight = nn.Parameter(weight[TARGET] - weight[list(AGAINST)])
        bounded, others = bound_plainly(plain.to(x.device), x), ()
    else:
        bounded, others = _ours(plain, x, task)

    def bound():
        given = {"eps": task["eps"]}
        if task.get("word"):
            eps = torch.zeros_like(x)
            eps[:, task["word"] - 1] = task["eps"]
            given = {"x_L": x - eps, "x_U": x + eps}
        ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), **given))
        with torch.set_grad_enabled(task["method"] == "CROWN-Optimized"):
            bounds = bounded.compute_bounds(x=(ball, *others), method=task["method"])
        if x.is_cuda:
            torch.cuda.synchronize()
        return bounds

    return bounded, bound


def _one_mode(task: dict) -> dict:
    """Runs in a process of its own (one per rank)."""
    import torch
    from memory import PeakMemory

    torch.set_num_threads(1)
    from transformer_models import profiled

    from lirpa_megatron.parallel import runtime

    runtime.initialize()
    if task["mode"] != "plain":  # imports what is imported late
        _build({**task, "layers": 1, "sequence": 2})[1]()
    memory = PeakMemory(task["device"] == "cuda")
    bounded, bound = _build(task)
    timing = profiled() if task["profile"] else contextlib.nullcontext({})
    result: dict = {}
    with timing as spent:
        for _ in range(2):
            spent.clear()
            if task["mode"] != "plain":
                traffic = bounded.context.collectives.traffic
                counted = bounded.schedule.communication.counted
                traffic.clear()
                counted.clear()
            start, processor = time.perf_counter(), time.process_time()
            try:
                lower, upper = bound()
            except AssertionError:  # of plain auto_LiRPA: a variance that may be negative
                result["failed"] = True
                break
            result["seconds"] = time.perf_counter() - start
            result["processor"] = time.process_time() - processor
            result["lower"] = lower.mean().item()
            result["width"] = (upper - lower).mean().item()
            if task["mode"] != "plain":
                result["sent"] = {"all": traffic.total_bytes, **counted}
            if result["seconds"] > 15:  # what the first run compiles does not show any more
                break
        result["spent"] = dict(spent)
    result["mib"] = memory.stop()
    if task["profile"] and result["seconds"] <= 15:  # its events fill the memory
        with kinds.by_kind() as result["kinds"]:
            bound()
    runtime.shutdown()
    return result


def _row(name: str, ranks: list[dict] | None, base: dict[str, list[dict]], limit: float) -> str:
    if ranks is None:
        return f"| {name} | > {limit:g} | " + " | ".join(["-"] * 8) + " |"
    if "failed" in ranks[0]:
        return f"| {name} | fails | " + " | ".join(["-"] * 8) + " |"

    def worst(results, key):
        return max(r[key] for r in results)

    def ratio(key, to):
        if not base.get(to) or "failed" in base[to][0]:
            return "-"
        return f"{worst(ranks, key) / worst(base[to], key):.2f}"

    cells = [name]
    for key, form in (("seconds", ".2f"), ("processor", ".2f"), ("mib", ".0f")):
        cells.append(f"{worst(ranks, key):{form}}")
        if key != "processor":
            cells += [ratio(key, "plain"), ratio(key, "tp1")]
    cells += [f"{ranks[0]['lower']:.4f}", f"{ranks[0]['width']:.4f}"]
    return f"| {' | '.join(cells)} |"


def _print_profile(name: str, result: dict) -> None:
    print(f"\n{name}: where the time goes\n\n| part | s | % | calls |\n|---|---|---|---|")
    parts = sorted(result["spent"].items(), key=lambda item: -item[1][0])
    rest = result["seconds"] - sum(seconds for _, (seconds, _) in parts)
    for part, (seconds, calls) in [*parts, ("everything else", (rest, ""))]:
        print(f"| {part} | {seconds:.2f} | {100 * seconds / result['seconds']:.0f} | {calls} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 3, 6])
    parser.add_argument("--sequence", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--word", type=int, help="the only embedding that moves, from 1 on")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one mode")
    parser.add_argument("--method", default="CROWN", choices=("CROWN", "CROWN-Optimized"))
    parser.add_argument("--moves", default="auto", choices=("auto", "A", "weights"),
                        help="what passes bring to the other ranks (option of BoundedModule)")
    parser.add_argument("--quick", action="store_true", help="one layer, eight tokens")
    parser.add_argument("--profile", action="store_true", help="where this package's time goes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"),
                        help="cuda: plain and tp1 alone, unless there are more GPUs")
    parser.add_argument("--auto-lirpa", default=os.environ.get("AUTO_LIRPA"),
                        help="a folder with auto_LiRPA; by default the one that is installed")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.sequence = [1], [8]
    from workers import host_version, launch

    version = host_version(arguments.auto_lirpa)
    modes = [m for m in arguments.modes if m != "plain" or version != "0.3"]
    print(f"{arguments.method}, auto_LiRPA {version}, hidden {HIDDEN}, FFN {FFN}, {HEADS} heads, "
          f"eps {arguments.eps:g}, {os.cpu_count()} cores")
    figures = {}
    for layers in arguments.layers:
        for sequence in arguments.sequence:
            print(f"\n{layers} layers, {sequence} tokens\n\n| mode | s | /plain | /tp1 | CPU s | "
                  "MiB | /plain | /tp1 | mean lower bound | mean width |")
            print("|---" * 10 + "|", flush=True)
            found: dict = {}
            for mode in modes:
                task = {"layers": layers, "sequence": sequence, "mode": mode,
                        "moves": arguments.moves, "method": arguments.method,
                        "device": arguments.device, "word": arguments.word,
                        "eps": arguments.eps, "profile": arguments.profile and mode != "plain"}
                found[mode] = launch(
                    __file__, task, MODES[mode], arguments.limit, arguments.auto_lirpa
                )
                print(_row(mode, found[mode], found, arguments.limit), flush=True)
            figures[f"{layers}x{sequence}"] = found
            shares = {m: r[0]["kinds"] for m, r in found.items() if r and "kinds" in r[0]}
            if shares:
                print("\n" + kinds.table(shares))
            for mode, ranks in found.items():
                if ranks and ranks[0].get("spent"):
                    _print_profile(f"{mode}, {layers} layers, {sequence} tokens", ranks[0])
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _one_mode)
