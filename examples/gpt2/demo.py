"""Certifies what GPT-2 says next, from a Hugging Face folder of your own; nothing is downloaded.

    make demo-gpt2 HF=FOLDER
    make demo-gpt2 HF=FOLDER ARGS='--prompt "Paris is in" --layers 4 --processes 2'

FOLDER has config.json, model.safetensors, and tokenizer.json or vocab.json with merges.txt.

GPT-2 reads the prompt and says which token comes next. The question is whether it still prefers
this token to its strongest rivals when the hidden states that enter the last layers change, at all
positions, by up to eps in each number. With `--layers all` these are the prompt's embeddings.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    UserError,
    from_layer,
    next_token_margins,
)
from lirpa_megatron.checkpoint.language_model import load_language_model
from lirpa_megatron.parallel import runtime
from lirpa_megatron.verify.sentences.tokenizer import read_tokenizer
from lirpa_megatron.verify.sentences.tokenizer_files import find_tokenizer


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Hugging Face folder of a GPT-2")
    parser.add_argument("--prompt", default="The sky is", help="default: %(default)s")
    parser.add_argument("--layers", default="2", help="how many of the last, or all; default 2")
    parser.add_argument("--eps", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2],
                        help="tried in turn until one is not certified; default: 1e-4 1e-3 1e-2")
    parser.add_argument("--rivals", type=int, default=5, help="how many; default 5")
    parser.add_argument("--processes", type=int, default=1, help="tensor-parallel ranks; default 1")
    return parser.parse_args()


def restart(processes):
    """This program as so many tensor-parallel ranks, in place of this process."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [sys.executable, *launch, *sys.argv])


def token_names(path):
    """Token id -> text in quotes, from tokenizer.json or vocab.json."""
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"] if path.name == "tokenizer.json" else content
    return {index: repr(token.replace("\u0120", " ")) for token, index in vocabulary.items()}


def clean_run(model, ids, layer):
    """(what enters the layer [1, S, h], logits at the last position [V]) of the model itself."""
    entered = []
    handle = model.decoder.layers[layer].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(ids, torch.arange(ids.shape[1])[None], None)
    handle.remove()
    return entered[0].transpose(0, 1).contiguous(), logits[0, -1]  # Megatron: sequence first


def certify(settings):
    """Prints what is certified; every rank calls this."""
    tokenizer = find_tokenizer(settings.folder)
    if tokenizer is None:
        raise UserError(f"{settings.folder} has no tokenizer.json, nor vocab.json and merges.txt")
    encoded = read_tokenizer(tokenizer).encode(settings.prompt)
    names, ids = token_names(tokenizer), torch.tensor([encoded.ids])
    description, model = load_language_model(settings.folder, runtime.tp_group())
    total = description.num_layers
    count = total if settings.layers == "all" else int(settings.layers)
    if not 1 <= count <= total:
        raise UserError(f"--layers {count}: the model has {total}")
    say = print if runtime.is_rank0() else lambda *_, **__: None

    hidden, logits = clean_run(model, ids, total - count)
    best, *rivals = logits.topk(settings.rivals + 1).indices.tolist()
    say(f"{description.kind}, {total} layers of width {description.hidden_size}; "
        f"TP={runtime.tp_size()}")
    say(f"{settings.prompt!r} ({ids.shape[1]} tokens) -> {names[best]}, rather than "
        f"{', '.join(names[rival] for rival in rivals)}")
    say(f"\nchanged: what enters the last {count} of {total} layers, {list(hidden.shape[1:])} "
        "numbers\n\n| eps | smallest margin | | s |\n|---|---|---|---|")
    margins = next_token_margins(from_layer(model, total - count), against=rivals)
    target = torch.tensor([best])
    bounded = BoundedModule(margins, (hidden, target))
    say(f"| 0 | {(logits[best] - logits[rivals[0]]).item():.4f} | | |", flush=True)
    for eps in settings.eps:
        start = time.perf_counter()
        ball = BoundedTensor(hidden, PerturbationLpNorm(norm=float("inf"), eps=eps))
        with torch.no_grad():
            lower, _ = bounded.compute_bounds((ball, target), method="CROWN")
        holds = bool((lower > 0).all())
        say(f"| {eps:g} | at least {lower.min().item():.4f} | "
            f"{'certified' if holds else 'not certified'} | {time.perf_counter() - start:.1f} |",
            flush=True)
        if not holds:
            break


def main():
    settings = parsed()
    if settings.processes > 1 and "WORLD_SIZE" not in os.environ:
        restart(settings.processes)
    try:
        with runtime.session():
            certify(settings)
    except UserError as error:
        sys.exit(f"demo.py: {error}")


if __name__ == "__main__":
    main()
