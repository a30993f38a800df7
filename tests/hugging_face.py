"""Small Hugging Face folders of every supported kind, written without the transformers library."""

import json

import torch

HIDDEN, FFN, HEADS, GROUPS, LAYERS, WORDS, LENGTH = 16, 32, 4, 2, 2, 32, 16

_LLAMA = dict(
    hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, rms_norm_eps=1e-5,
    num_attention_heads=HEADS, num_key_value_heads=GROUPS, hidden_act="silu", vocab_size=WORDS,
    max_position_embeddings=LENGTH, attention_bias=False, initializer_range=0.02,
    attention_dropout=0.0, use_cache=True, bos_token_id=1, eos_token_id=2, torch_dtype="float32",
    transformers_version="4.57.0", rope_theta=500000.0, tie_word_embeddings=False,
)
_QWEN = {key: value for key, value in _LLAMA.items() if key != "attention_bias"}
SCALE = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=8192)
CONFIGS = {
    "gpt2": dict(
        model_type="gpt2", n_embd=HIDDEN, n_head=HEADS, n_layer=LAYERS, n_positions=LENGTH,
        n_ctx=LENGTH, layer_norm_epsilon=1e-5, vocab_size=WORDS, activation_function="gelu_new",
        attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, architectures=["GPT2LMHeadModel"],
        summary_type="cls_index", task_specific_params={"text-generation": {"max_length": 50}},
    ),
    "llama": dict(_LLAMA, model_type="llama", mlp_bias=False, rope_scaling=SCALE, pretraining_tp=1),
    "llama of transformers 5": {
        **{k: v for k, v in _LLAMA.items() if k not in ("rope_theta", "torch_dtype")},
        "model_type": "llama", "dtype": "float32", "mlp_bias": False, "head_dim": 4,
        "rope_parameters": {**SCALE, "rope_theta": 500000.0},
    },
    "mistral": dict(_LLAMA, model_type="mistral", sliding_window=None),
    "mistral with a window": dict(_LLAMA, model_type="mistral", sliding_window=12, head_dim=8),
    "qwen2": dict(_QWEN, model_type="qwen2", tie_word_embeddings=True, use_sliding_window=False,
                  sliding_window=4, max_window_layers=1),
    "qwen3": dict(_LLAMA, model_type="qwen3", head_dim=8, use_sliding_window=False,
                  sliding_window=None, max_window_layers=2, rope_scaling=None),
}


def tensors(config, dtype=torch.float32, seed=0):
    """Tensors as the folder stores them."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape, around=0.0):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (around + 0.3 * value).to(dtype)

    if config["model_type"] == "gpt2":
        found = {"wte.weight": new(WORDS, HIDDEN), "wpe.weight": new(LENGTH, HIDDEN)}
        norms, shapes = ["ln_f"], {}
        for i in range(LAYERS):
            norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
            shapes |= {f"h.{i}.attn.c_attn": (HIDDEN, 3 * HIDDEN),
                       f"h.{i}.attn.c_proj": (HIDDEN, HIDDEN),
                       f"h.{i}.mlp.c_fc": (HIDDEN, 4 * HIDDEN),
                       f"h.{i}.mlp.c_proj": (4 * HIDDEN, HIDDEN)}
            found[f"h.{i}.attn.bias"] = torch.ones(1, 1, LENGTH, LENGTH).tril()
        for name in norms:
            found |= {f"{name}.weight": new(HIDDEN, around=1.0), f"{name}.bias": new(HIDDEN)}
        for name, (rows, columns) in shapes.items():
            found |= {f"{name}.weight": new(rows, columns), f"{name}.bias": new(columns)}
        return found
    size = config.get("head_dim") or HIDDEN // HEADS
    found = {"model.embed_tokens.weight": new(WORDS, HIDDEN),
             "model.norm.weight": new(HIDDEN, around=1.0)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = new(WORDS, HIDDEN)
    for i in range(LAYERS):
        name = f"model.layers.{i}"
        for part, count in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            found[f"{name}.self_attn.{part}_proj.weight"] = new(count * size, HIDDEN)
            if config["model_type"] == "qwen2":
                found[f"{name}.self_attn.{part}_proj.bias"] = new(count * size)
        if config["model_type"] == "qwen3":
            for part in "qk":
                found[f"{name}.self_attn.{part}_norm.weight"] = new(size, around=1.0)
        found[f"{name}.self_attn.o_proj.weight"] = new(HIDDEN, HEADS * size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{name}.{norm}.weight"] = new(HIDDEN, around=1.0)
        found |= {f"{name}.mlp.gate_proj.weight": new(FFN, HIDDEN),
                  f"{name}.mlp.up_proj.weight": new(FFN, HIDDEN),
                  f"{name}.mlp.down_proj.weight": new(HIDDEN, FFN)}
    return found


def save(folder, name, dtype=torch.float32, files=1, change=None, **config):
    """Writes a folder of a kind of CONFIGS.

    Args:
        folder: to make.
        name: key of CONFIGS.
        dtype: of the weights.
        files: number of safetensors files; with an index if more than one.
        change: (tensors) -> None, changes them.
        **config: replace keys of config.json.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    content = {**CONFIGS[name], **config}
    (folder / "config.json").write_text(json.dumps(content))
    stored = tensors(content, dtype)
    if change:
        change(stored)
    if files == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {key: stored[key] for key in sorted(stored)[number::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
