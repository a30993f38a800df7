"""The sentiment classifiers of `sst.py` and `depth.py`: their data, their training, their file.

The plain transformer of `transformer_models` on word embeddings; weights are kept in a file.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "sst"
HEADS, LENGTH = 4, 24
SIZES = {"layers": 2, "hidden": 64, "ffn": 256}


def read(split: str) -> list[dict]:
    """The sentences of one of the files, each with its label."""
    with open(DATA / f"{split}.jsonl") as file:
        return [json.loads(line) for line in file]


def words_of(record: dict) -> list[str]:
    """Of a sentence, in lower case."""
    return record["sentence"].lower().split()


def parts_of(sizes: dict, words: int, parts: tuple[str, ...] = ()):
    """The classifier: embeddings of words and of places, and the transformer."""
    from torch import nn
    from transformer_models import Plain

    return nn.ModuleDict({
        "words": nn.Embedding(words, sizes["hidden"]),
        "places": nn.Embedding(LENGTH, sizes["hidden"]),
        "body": Plain(sizes["layers"], sizes["hidden"], sizes["ffn"], HEADS, 2, parts=parts),
    })


def train(path: Path, epochs: int = 5, sizes: dict = SIZES, warmup: int = 1) -> None:
    """Trains the classifier and writes what `load` reads: the epoch best on the dev set.

    Args:
        path: the file to write.
        epochs: over all of the training set.
        sizes: as `SIZES`.
        warmup: batches over which the learning rate grows to its full size.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    records = {split: read(split) for split in ("train", "dev")}
    count = Counter(word for record in records["train"] for word in words_of(record))
    vocabulary = ["<pad>", "<cls>", "<unk>", *(w for w, n in count.items() if n > 1)]
    index = {word: i for i, word in enumerate(vocabulary)}

    def tensors(split):
        ids = torch.zeros(len(records[split]), LENGTH, dtype=torch.long)
        for row, record in zip(ids, records[split], strict=True):
            found = [1, *(index.get(word, 2) for word in words_of(record))][:LENGTH]
            row[: len(found)] = torch.tensor(found)
        return ids, torch.tensor([record["label"] for record in records[split]])

    (ids, labels), (dev_ids, dev_labels) = tensors("train"), tensors("dev")
    model = parts_of(sizes, len(vocabulary))
    words, places, body = model["words"], model["places"], model["body"]
    nn.init.normal_(places.weight, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warmup))
    best = 0.0

    def logits(x):
        return body(words(x) + places.weight[: x.shape[1]], (x == 0)[:, None, None].float())

    for epoch in range(epochs):
        for chosen in torch.randperm(len(ids)).split(64):
            x = ids[chosen]
            dropped = (torch.rand(x.shape) < 0.1) & (x > 2)
            loss = F.cross_entropy(logits(x.masked_fill(dropped, 2)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = (logits(dev_ids).argmax(-1) == dev_labels).float().mean().item()
        print(f"epoch {epoch + 1}: dev accuracy {right:.4f}", file=sys.stderr)
        if right > best:
            best = right
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"vocabulary": vocabulary, "accuracy": best, "sizes": sizes,
                        "weights": model.state_dict()}, path)


def load(path: Path, parts: tuple[str, ...]):
    """(body, function: words -> ids [1, S], function: ids -> hidden [1, S, h])."""
    import torch

    saved = torch.load(path)
    index = {word: i for i, word in enumerate(saved["vocabulary"])}
    model = parts_of(saved.get("sizes", SIZES), len(index), parts)
    model.load_state_dict(saved["weights"])
    model.eval().requires_grad_(False)

    def encode(words):
        return torch.tensor([[1, *(index.get(word, 2) for word in words)]])

    def embed(ids):
        return model["words"](ids) + model["places"].weight[: ids.shape[1]]

    return model["body"], encode, embed
