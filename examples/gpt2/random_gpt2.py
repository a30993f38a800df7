"""Writes a folder like GPT-2's on Hugging Face, with random weights, to try the demo.

    python examples/gpt2/random_gpt2.py FOLDER                   GPT-2 small's sizes, 0.5 GB
    python examples/gpt2/random_gpt2.py FOLDER --layers 2 --hidden 32 --heads 4 --words 400

The weights are drawn as GPT-2 draws them before training (standard deviation 0.02, norms of ones),
embeddings five times as large, so that words differ. The tokenizer joins pairs of letters.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

STD = 0.02
END = "<|endoftext|>"


def config(sizes):
    """config.json with the keys that GPT-2's has."""
    return {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": sizes.words - 1, "embd_pdrop": 0.1,
        "eos_token_id": sizes.words - 1, "initializer_range": STD, "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2", "n_ctx": sizes.positions, "n_embd": sizes.hidden,
        "n_head": sizes.heads, "n_layer": sizes.layers, "n_positions": sizes.positions,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": sizes.words,
    }


def tensors(sizes):
    """Name -> tensor, as in GPT-2's file: weights are [in, out], the output layer is `wte`."""
    h = sizes.hidden
    generator = torch.Generator().manual_seed(0)

    def new(*shape, std=STD):
        return torch.randn(shape, generator=generator) * std

    found = {
        "wte.weight": new(sizes.words, h, std=5 * STD),
        "wpe.weight": new(sizes.positions, h, std=STD),
    }
    mask = torch.ones(1, 1, sizes.positions, sizes.positions).tril()
    for layer in (f"h.{i}" for i in range(sizes.layers)):
        # What adds to the residual stream is drawn smaller the more layers there are.
        small = STD / (2 * sizes.layers) ** 0.5
        for name, rows, columns, std in (
            ("attn.c_attn", h, 3 * h, STD), ("attn.c_proj", h, h, small),
            ("mlp.c_fc", h, 4 * h, STD), ("mlp.c_proj", 4 * h, h, small),
        ):
            found[f"{layer}.{name}.weight"] = new(rows, columns, std=std)
            found[f"{layer}.{name}.bias"] = torch.zeros(columns)
        found[f"{layer}.attn.bias"] = mask.clone()
    for norm in [f"h.{i}.ln_{j}" for i in range(sizes.layers) for j in (1, 2)] + ["ln_f"]:
        found |= {f"{norm}.weight": torch.ones(h), f"{norm}.bias": torch.zeros(h)}
    return found


def tokenizer(words):
    """(vocab.json, the merges) of byte-level BPE: 256 bytes, pairs of letters, the end of text."""
    # GPT-2 writes bytes that are no visible letter as the letters from 256 on, in order.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [256 + i for i in range(256 - len(visible))]
    alphabet = [chr(code) for code in [*visible, *hidden]]
    # The likely pairs first; a blank before a word is \u0120.
    likely = sorted(alphabet, key=lambda a: (a not in "\u0120etaoinshrdlucmfwypvbgkjqxz", a))
    pairs = itertools.islice(itertools.product(likely, repeat=2), words - 257)
    merges = list(pairs)
    tokens = [*alphabet, *("".join(pair) for pair in merges), END]
    return {token: index for index, token in enumerate(tokens)}, merges


def write(folder, sizes):
    """The files that the demo reads; `folder` must not exist."""
    folder.mkdir(parents=True)
    vocabulary, merges = tokenizer(sizes.words)
    (folder / "config.json").write_text(json.dumps(config(sizes), indent=2))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_file(tensors(sizes), folder / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--words", type=int, default=50257, help="tokens, more than 257")
    parser.add_argument("--positions", type=int, default=1024)
    sizes = parser.parse_args()
    write(sizes.folder, sizes)


if __name__ == "__main__":
    main()
