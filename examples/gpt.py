"""A GPT whose next word is certified while all embeddings are perturbed.

    python examples/gpt.py
    torchrun --nproc-per-node 2 examples/gpt.py

Both print the same numbers: the model is sharded over the processes, and its bounds are those of
the whole model. It learns sequences that repeat with period 3 (a b c a b: next is c). For a few
sequences in which c is due, the script certifies that c has the largest logit even if every
coordinate of every embedding changes by up to eps.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from lirpa_megatron import BoundedModule, next_token_margins, perturb_tokens, smallest_margin
from lirpa_megatron.parallel import runtime

VOCABULARY, LENGTH, PERIOD = 16, 5, 3
STEPS, BATCH = 150, 64
EPS = 0.002


def build():
    """LayerNorm, GELU, learned positions: the same weights at every tensor-parallel size."""
    config = TransformerConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4,
        tensor_model_parallel_size=runtime.tp_size(),
        use_cpu_initialization=True,  # every rank draws the full weights and keeps its part
        init_method_std=0.2, hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=torch.float64, gradient_accumulation_fusion=False, persist_layer_norm=False,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=LENGTH,
        parallel_output=False,  # whole logits on every rank
        position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True,
    )
    return model.double()


def sequences(count):
    """(ids [count, LENGTH], the ids that follow each of them)."""
    words = torch.rand(count, VOCABULARY).argsort(1)[:, :PERIOD]  # different ones
    repeated = words.repeat(1, LENGTH // PERIOD + 1)
    return repeated[:, :LENGTH], repeated[:, 1 : LENGTH + 1]


def train(model):
    """Plain next-token training; Megatron's own forward, in which gradients are synchronised."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    for _ in range(STEPS):
        ids, following = sequences(BATCH)
        logits = model(ids, positions, None)  # causal; [B, S, V]
        known = slice(PERIOD - 1, None)  # what comes before is not to be guessed
        loss = F.cross_entropy(logits[:, known].flatten(0, 1), following[:, known].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def lower_margins(model, bounded, ids, targets, eps):
    """By how much each target certainly wins, for all embeddings within eps."""
    inputs = (*perturb_tokens(model, ids, eps=eps), targets)
    lower, _ = bounded.compute_bounds(inputs, method="CROWN")
    return smallest_margin(lower, targets, VOCABULARY)


def certified_radius(margins, count, largest=0.05, steps=6):
    """The largest eps, for each sequence, that bisection finds its margin above 0 at."""
    low, high = torch.zeros(count), torch.full((count,), largest)
    for _ in range(steps):
        middle = (low + high) / 2
        holds = margins(middle.unsqueeze(1).repeat(1, LENGTH)) > 0
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low


def main():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # the same on every rank
    model = build()
    train(model)
    model.eval().requires_grad_(False)

    ids, following = sequences(2)
    targets = following[:, -1]
    bounded = BoundedModule(
        next_token_margins(model), (*perturb_tokens(model, ids, eps=EPS), targets)
    )
    clean, near = (lower_margins(model, bounded, ids, targets, eps) for eps in (0.0, EPS))
    radius = certified_radius(
        lambda eps: lower_margins(model, bounded, ids, targets, eps), len(ids)
    )
    if runtime.is_rank0():
        for row in range(len(ids)):
            print(
                f"{ids[row].tolist()} -> {targets[row]}: margin {clean[row]:.6f}, at least "
                f"{near[row]:.6f} within eps {EPS}; certified up to eps {radius[row]:.6f}"
            )


if __name__ == "__main__":
    with runtime.session():  # all torchrun processes, or this one
        main()
