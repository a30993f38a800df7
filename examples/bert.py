"""A BERT classifier that is certified against the replacement of words.

    python examples/bert.py
    torchrun --nproc-per-node 2 examples/bert.py

The classifier (binary head, padded sentences) says whether a sentence has more good words than bad
ones. The script certifies that one neutral word may be replaced by any other: the embedding at its
position ranges over the convex hull of all neutral words ('hull'), or over the smallest box around
them ('box'), which is looser; with eps, all embeddings may also change by eps. Training pulls the
neutral words together; otherwise no set around all of them could be certified.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.transformer_config import TransformerConfig

from lirpa_megatron import BoundedModule, bert_head, classification_margins, embed, perturb_tokens
from lirpa_megatron.parallel import runtime

START, PADDING = 0, 1
GOOD, BAD, NEUTRAL = range(2, 6), range(6, 10), range(10, 16)
VOCABULARY, LENGTH = 16, 6
STEPS, BATCH = 100, 64


def build():
    """LayerNorm, GELU, learned positions: the same weights at every tensor-parallel size."""
    config = TransformerConfig(
        num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4,
        tensor_model_parallel_size=runtime.tp_size(),
        use_cpu_initialization=True,  # every rank draws the full weights and keeps its part
        init_method_std=0.2, hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=torch.float64, gradient_accumulation_fusion=False, persist_layer_norm=False,
    )
    model = BertModel(
        config, num_tokentypes=0, transformer_layer_spec=bert_layer_local_spec,
        vocab_size=VOCABULARY, max_sequence_length=LENGTH, parallel_output=False,
    )
    return model.double()


def sentences(count):
    """(ids, padding mask with 1 where kept, labels: 1 where good words outnumber bad ones)."""
    labels = torch.randint(2, (count,))
    deciding = torch.randint(GOOD[0], GOOD[-1] + 1, (count, 2)) + (1 - labels).unsqueeze(1) * 4
    neutral = torch.randint(NEUTRAL[0], NEUTRAL[-1] + 1, (count, LENGTH - 3))
    words = torch.cat([deciding, neutral], 1)
    order = torch.rand(count, LENGTH - 2).argsort(1)  # of all but the last, which may be padding
    words[:, :-1] = words[:, :-1].gather(1, order)
    ids = torch.cat([torch.full((count, 1), START), words], 1)
    ids[torch.rand(count) < 0.5, -1] = PADDING
    return ids, (ids != PADDING).long(), labels


def train(model):
    """Classifier training through Megatron's own forward, neutral words drawn together."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    neutral = torch.tensor(NEUTRAL).unsqueeze(1)  # sentences of one word
    for _ in range(STEPS):
        ids, mask, labels = sentences(BATCH)
        _, logits = model(ids, mask)  # of the words, and of the binary head
        spread = embed(model, neutral).var(0).sum()
        loss = F.cross_entropy(logits, labels) + spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # the same on every rank
    model = build()
    train(model)
    model.eval().requires_grad_(False)

    ids, mask, labels = sentences(2)
    places = [next(p for p in range(LENGTH) if row[p] in NEUTRAL) for row in ids]
    substitutes = [{place: NEUTRAL} for place in places]  # for each sentence
    C = classification_margins(labels, 2)

    def lower_margins(**words):
        """By how much the label certainly wins over the other class."""
        inputs = perturb_tokens(model, ids, attention_mask=mask, **words)
        bounded = BoundedModule(bert_head(model, "binary"), inputs)
        return bounded.compute_bounds(inputs, C=C, method="CROWN")[0][:, 0]

    clean, box = lower_margins(eps=0.0), lower_margins(substitutes=substitutes)
    hull = lower_margins(substitutes=substitutes, shape="hull")
    low, high = torch.zeros(len(ids)), torch.full((len(ids),), 0.1)
    for _ in range(6):  # bisection: the largest eps at which the box is still certified
        eps = (low + high) / 2
        holds = lower_margins(substitutes=substitutes, eps=eps[:, None].repeat(1, LENGTH)) > 0
        low, high = torch.where(holds, eps, low), torch.where(holds, high, eps)
    if runtime.is_rank0():
        for row in range(len(ids)):
            print(
                f"{ids[row].tolist()} is {'good' if labels[row] else 'bad'}: margin "
                f"{clean[row]:.6f}; any neutral word at {places[row]}: at least {hull[row]:.6f} "
                f"(hull), {box[row]:.6f} (box), certified up to eps {low[row]:.6f} around it"
            )


if __name__ == "__main__":
    with runtime.session():  # all torchrun processes, or this one
        main()
