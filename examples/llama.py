"""A LLaMA-like model whose next word is certified while some positions are perturbed.

    python examples/llama.py
    torchrun --nproc-per-node 2 examples/llama.py

RMSNorm, SwiGLU, rotary positions and grouped queries; with two processes each has one query group.
The model learns sequences in which two words alternate (a b a b a b: next is a). The script
certifies that a has the largest logit even if the embeddings at the first positions move, each
within its own L2 ball; the last two words are not perturbed.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from lirpa_megatron import BoundedModule, next_token_margins, perturb_tokens, smallest_margin
from lirpa_megatron.parallel import runtime

VOCABULARY, LENGTH = 16, 6
STEPS, BATCH = 120, 64
MOVING = range(4)  # positions; the last two stay
EPS = 0.01


def build():
    """The same weights at every tensor-parallel size."""
    config = TransformerConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4, num_query_groups=2,
        normalization="RMSNorm", activation_func=F.silu, gated_linear_unit=True,
        add_bias_linear=False, tensor_model_parallel_size=runtime.tp_size(),
        use_cpu_initialization=True,  # every rank draws the full weights and keeps its part
        init_method_std=0.2, hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=torch.float64, gradient_accumulation_fusion=False, persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=VOCABULARY,
        max_sequence_length=LENGTH, parallel_output=False,  # whole logits on every rank
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )
    return model.double()


def sequences(count):
    """(ids [count, LENGTH], the ids that follow each of them)."""
    words = torch.rand(count, VOCABULARY).argsort(1)[:, :2]  # two different ones
    repeated = words.repeat(1, LENGTH // 2 + 1)
    return repeated[:, :LENGTH], repeated[:, 1 : LENGTH + 1]


def train(model):
    """Plain next-token training through Megatron's own forward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    for _ in range(STEPS):
        ids, following = sequences(BATCH)
        logits = model(ids, positions, None)[:, 1:]  # the second word is not to be guessed
        loss = F.cross_entropy(logits.flatten(0, 1), following[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def lower_margins(model, bounded, ids, targets, radii):
    """By how much each target certainly wins; radii [B, S], of a ball at each position."""
    inputs = (*perturb_tokens(model, ids, eps=radii, norm=2, positions=MOVING), targets)
    lower, _ = bounded.compute_bounds(inputs, method="CROWN")
    return smallest_margin(lower, targets, VOCABULARY)


def certified_radius(margins, count, largest=0.5, steps=6):
    """The largest radius, for each sequence, that bisection finds its margin above 0 at."""
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
    radii = torch.full(ids.shape, EPS)
    inputs = (*perturb_tokens(model, ids, eps=radii, norm=2, positions=MOVING), targets)
    bounded = BoundedModule(next_token_margins(model), inputs)
    near = lower_margins(model, bounded, ids, targets, radii)
    radius = certified_radius(
        lambda radii: lower_margins(model, bounded, ids, targets, radii), len(ids)
    )
    if runtime.is_rank0():
        for row in range(len(ids)):
            print(
                f"{ids[row].tolist()} -> {targets[row]}: margin at least {near[row]:.6f} within "
                f"radius {EPS}; certified up to radius {radius[row]:.6f}"
            )


if __name__ == "__main__":
    with runtime.session():  # all torchrun processes, or this one
        main()
