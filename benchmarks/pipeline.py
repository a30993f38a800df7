"""Memory, processor time, bytes and idle time of CROWN over pipeline stages.

    python benchmarks/pipeline.py [--models mlp gpt] [--modes pp1 pp2 pp4 tp2pp2]
        [--splits even balanced] [--layers N] [--batch 64] [--sequence 4] [--repeat 2]
        [--numbers N] [--opts JSON] [--limit 600] [--json FILE]

'mlp' has 24 linear layers of width 128 with ReLU between them, ten outputs, L-inf 1e-4, a batch of
64; all neurons get rows. 'gpt' is a GPTModel of 6 layers (hidden 128, FFN 512, 4 heads, tanh GELU,
64 tokens in the vocabulary), 4 tokens, L-inf 1e-4 on all embeddings, the logits of the last one.
Random weights, the same in every mode, float32; each rank draws its own layers only. Splits: as
many layers on each stage, and `crown.stage_split.balanced_split`.

Every mode runs in processes of its own, one thread each. Memory is the most that a rank has
allocated, above what it is after the bounds of a tiny model of the same stages (see `memory`), in a
call of its own; processor time the least of the calls after it. 'idle' is the share of the time in
which a rank waits for messages in a replay of the recorded ones, as if each rank had a core of its
own (`pipeline_timeline`); 'of 2' the same where two pipelines, each at a sentence of its own, share
the cores (eight sentences in all); 'waits' is what the clock says. Bytes: 'rows' and 'answers' as
sent, and whether they are what the docstring of `crown.stage_below` says.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path

MODES = {"pp1": (1, 1), "pp2": (1, 2), "pp4": (1, 4), "tp2": (2, 1), "tp2pp2": (2, 2)}
"""Mode -> tensor-parallel and pipeline-parallel size."""
WIDTH, INPUTS, OUTPUTS = 128, 128, 10
HIDDEN, FFN, HEADS, VOCABULARY = 128, 512, 4, 64
EPS = 1e-4


def _drawn(name: str, shape, scale: float):
    """Weights that every mode has under one name."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return scale * torch.randn(*shape, generator=generator)


def _mlp(split, stage, width):
    """This rank's layers."""
    import torch
    from torch import nn

    from lirpa_megatron import PipelineStage, parallelize

    first, layers, parts = sum(split[:stage]), sum(split), []
    for i in range(first, first + split[stage]):
        sizes = (width, OUTPUTS if i == layers - 1 else width)
        linear = nn.Linear(*sizes)
        with torch.no_grad():
            for name, value in linear.named_parameters():
                value.copy_(_drawn(f"{i}.{name}", value.shape, (2 / width) ** 0.5))
        parts += [linear] if i == layers - 1 else [linear, nn.ReLU()]
    return PipelineStage(parallelize(nn.Sequential(*parts).eval()))


def _gpt(split, stage, length, hidden):
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformer_models import GELU

    from lirpa_megatron import at_position
    from lirpa_megatron.parallel import runtime

    layout = None
    if len(split) > 1:
        layout = [["decoder"] * n for n in split]
        layout[0], layout[-1] = ["embedding", *layout[0]], [*layout[-1], "loss"]
    config = TransformerConfig(
        num_layers=sum(split), hidden_size=hidden, ffn_hidden_size=4 * hidden,
        num_attention_heads=HEADS, tensor_model_parallel_size=runtime.tp_size(),
        pipeline_model_parallel_size=len(split), pipeline_dtype=torch.float32,
        pipeline_model_parallel_layout=layout, params_dtype=torch.float32,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, hidden_dropout=0.0,
        attention_dropout=0.0, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, persist_layer_norm=False, apply_rope_fusion=False,
        attention_softmax_in_fp32=True, activation_func=GELU,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=length,
        pre_process=stage == 0, post_process=stage == len(split) - 1, parallel_output=False,
        position_embedding_type="none", share_embeddings_and_output_weights=False,
    ).eval()
    before = sum(split[:stage])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            head, _, rest = name.partition(".layers.")
            if rest:
                index, _, rest = rest.partition(".")
                name = f"{head}.layers.{int(index) + before}.{rest}"
            if "layernorm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            shape, dim, parts = list(parameter.shape), 0, 1
            if getattr(parameter, "tensor_model_parallel", False):
                dim, parts = parameter.partition_dim, runtime.tp_size()
                shape[dim] *= parts
            whole = _drawn(name, shape, 0.5 * shape[-1] ** -0.5)
            parameter.copy_(whole.chunk(parts, dim)[runtime.tp_rank() if parts > 1 else 0])
    return at_position(model, -1)


def _build(task, tiny=False):
    """(bounded module, function that bounds, coordinates of the input)."""
    import torch
    from megatron.core import parallel_state

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
    from lirpa_megatron.operators.tuning import Tuning

    split, stage = task["split"], parallel_state.get_pipeline_model_parallel_rank()
    if tiny:
        split = [2] * len(split)
    generator = torch.Generator().manual_seed(9)
    if task["model"] == "mlp":
        width = 8 if tiny else WIDTH
        model = _mlp(split, stage, width)
        x = torch.rand(2 if tiny else task["batch"], width, generator=generator)
    else:
        hidden = 16 if tiny else HIDDEN
        length = 2 if tiny else task["sequence"]
        model = _gpt(split, stage, length, hidden)
        x = torch.randn(1, length, hidden, generator=generator)
    options = {"sparse_intermediate_bounds": False, **task["options"]}
    if task["numbers"] is not None:
        options["tuning"] = Tuning(
            numbers_for_stages=task["numbers"], relaxed_numbers_for_stages=task["numbers"]
        )
    bounded = BoundedModule(model, (x,), options)

    def bound():
        with torch.no_grad():
            ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=EPS))
            return bounded.compute_bounds(x=(ball,), method="CROWN")

    return bounded, bound, x[0].numel()


def _one_mode(task: dict) -> dict:
    """Runs in a process of its own (one per rank)."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from memory import PeakMemory
    from pipeline_timeline import Timeline, idle_shares

    from lirpa_megatron.compat import gloo, megatron_cpu
    from lirpa_megatron.parallel import runtime

    torch.set_num_threads(1)
    megatron_cpu.install()
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    with gloo.one_device():  # as `runtime.initialize`
        dist.init_process_group("gloo", **(alone if task["ranks"] == 1 else {}))
        parallel_state.initialize_model_parallel(task["tp"], len(task["split"]))
    _build(task, tiny=True)[1]()
    dist.barrier()
    memory = PeakMemory()
    bounded, bound, coordinates = _build(task)
    lower, upper = bound()
    result = {
        "mib": memory.stop(),
        "lower": lower[0].tolist()[:OUTPUTS], "upper": upper[0].tolist()[:OUTPUTS],
        "stage": parallel_state.get_pipeline_model_parallel_rank(), "tp_rank": runtime.tp_rank(),
        "weights": sum(p.numel() * p.element_size() for p in bounded.parameters()) / 2**20,
    }
    for _ in range(task["repeat"]):
        timeline = Timeline()
        traffic = None if bounded.pipeline is None else bounded.pipeline.traffic
        if traffic is not None:
            traffic.clear()
        dist.barrier()
        start, processor, thread = time.perf_counter(), time.process_time(), time.thread_time()
        with timeline.recorded(coordinates):
            bound()
        seconds = time.perf_counter() - start
        spent = time.process_time() - processor
        if spent < result.get("processor", float("inf")):
            result |= {
                "seconds": seconds, "processor": spent, "waits": timeline.waited / seconds,
                "thread": time.thread_time() - thread, "passes": timeline.passes,
                "events": [(k, w, a - thread, b - thread) for k, w, a, b in timeline.events],
                "expected": dict(timeline.expected),
                "sent": {} if traffic is None else dict(traffic.bytes),
                "messages": {} if traffic is None else dict(traffic.calls),
            }
    # Shares only, not the messages: what ranks print is short, so that it is not mixed up.
    column = [None] * len(task["split"])
    dist.all_gather_object(column, (result.pop("events"), result["thread"]),
                           group=parallel_state.get_pipeline_model_parallel_group())
    recorded = [{"events": events, "seconds": t} for events, t in column]
    result["idle"] = idle_shares(recorded)[result["stage"]]
    result["idle of 2"] = idle_shares(recorded, 2, 4)[result["stage"]]
    runtime.shutdown()
    return result


def _bytes_are_as_said(ranks: list[dict]) -> str:
    for x in ranks:
        if x["sent"].get("rows", 0) != x["expected"].get("rows", 0):
            return f"no: stage {x['stage']} rows {x['sent']['rows']} != {x['expected']['rows']}"
        for above in ranks:
            if (above["stage"], above["tp_rank"]) == (x["stage"] + 1, x["tp_rank"]):
                found, said = x["sent"].get("answer", 0), above["expected"].get("answer", 0)
                if found != said:
                    return f"no: stage {x['stage']} answers {found} != {said}"
    return "yes"


def _difference(ranks: list[dict], base: list[dict]) -> float:
    """Between the bounds of two modes, relative to the widest."""
    want = base[0]
    widest = max(u - v for u, v in zip(want["upper"], want["lower"], strict=True))
    return max(
        abs(a - b) for x in ranks for side in ("lower", "upper")
        for a, b in zip(x[side], want[side], strict=True)
    ) / widest


def _width(x: dict) -> float:
    return sum(u - v for u, v in zip(x["upper"], x["lower"], strict=True)) / len(x["upper"])


def _rows(name: str, split: list[int], ranks: list[dict], base: list[dict]) -> list[str]:
    found = []
    for x in sorted(ranks, key=lambda x: (x["stage"], x["tp_rank"])):
        kb = [x["sent"].get(what, 0) / 1e6 for what in ("rows", "answer")]
        found.append(
            f"| {name} | {x['stage']}.{x['tp_rank']} | {split[x['stage']]} | {x['mib']:.1f} "
            f"| {x['mib'] / max(b['mib'] for b in base):.2f} | {x['weights']:.2f} "
            f"| {x['processor']:.2f} "
            f"| {x['processor'] / max(b['processor'] for b in base):.2f} "
            f"| {x['idle']:.2f} | {x['idle of 2']:.2f} | {x['waits']:.2f} "
            f"| {kb[0]:.2f} | {kb[1]:.2f} |"
        )
    return found


HEAD = ("mode", "stage.rank", "layers", "MiB", "/pp1", "weights", "CPU s", "/pp1", "idle", "of 2",
        "waits", "MB of rows", "MB of answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("mlp", "gpt"), default=["mlp", "gpt"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--splits", nargs="+", choices=("even", "balanced"),
                        default=["even", "balanced"])
    parser.add_argument("--layers", type=int, help="24 of the MLP and 6 of the GPT by default")
    parser.add_argument("--batch", type=int, default=64, help="of the MLP")
    parser.add_argument("--sequence", type=int, default=4, help="tokens of the GPT")
    parser.add_argument("--repeat", type=int, default=2, help="calls that are timed")
    parser.add_argument("--opts", type=json.loads, default={}, help="options of BoundedModule")
    parser.add_argument("--numbers", type=int, help="`Tuning.numbers_for_stages`")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one mode")
    parser.add_argument("--json", type=Path, help="write every figure but the messages there")
    arguments = parser.parse_args()
    from workers import launch

    from lirpa_megatron.crown.stage_split import balanced_split

    figures = {}
    for model in arguments.models:
        layers = arguments.layers or {"mlp": 24, "gpt": 6}[model]
        print(f"\n{model}, {layers} layers\n\n| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|",
              flush=True)
        base = None
        for mode in arguments.modes:
            tp, stages = MODES[mode]
            even = [layers // stages + (s < layers % stages) for s in range(stages)]
            splits = {"even": even, "balanced": balanced_split(layers, stages)}
            splits = {k: splits[k] for k in arguments.splits} if stages > 1 else {"": even}
            for kind, split in splits.items():
                task = {"model": model, "tp": tp, "split": split, "ranks": tp * stages,
                        "batch": arguments.batch, "sequence": arguments.sequence,
                        "repeat": arguments.repeat, "options": arguments.opts,
                        "numbers": arguments.numbers}
                ranks = launch(__file__, task, tp * stages, arguments.limit, None)
                name = f"{mode} {kind}".strip()
                if ranks is None:
                    print(f"{name}: more than {arguments.limit:g} s", flush=True)
                    continue
                base = base or ranks
                print("\n".join(_rows(name, split, ranks, base)), flush=True)
                print(f"  {name}: wall {max(x['seconds'] for x in ranks):.2f} s, bytes as said: "
                      f"{_bytes_are_as_said(ranks)}, bounds differ by "
                      f"{_difference(ranks, base):.1e} of the widest, mean width "
                      f"{_width(ranks[0]):.3g}; rows sent "
                      f"{[x['passes'] for x in ranks]}, messages "
                      f"{[sum(x['messages'].values()) for x in ranks]}", flush=True)
                bulky = ("lower", "upper")
                figures[f"{model} {name}"] = [
                    {key: value for key, value in x.items() if key not in bulky} for x in ranks
                ]
                if arguments.json:
                    arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _one_mode)
