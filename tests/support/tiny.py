"""Tiny seeded random models, saved as real Hugging Face directories with a real tokenizer.

Everything downstream of the files is the real thing; only the weights mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from halfweave.files import sha256_file, write_json
from halfweave.kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from halfweave.kernels.groups import expand_groups, group_count
from halfweave.kernels.schema import LinearFormat, QuantizationConfig
from halfweave.runtime.families import decoder_spec
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = "<|im_end|>"
CONV1D = ("gpt2",)  # families whose dense linears are stored as [K, N]
VOCABULARY = 320
_TEXT = (
    "The quick brown fox jumps over the lazy dog. ",
    "Two weights of every four are kept, and the rest are zero. ",
    "A small model speaks in riddles; nobody minds. ",
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Tiny:
    """Which tiny model to make. The defaults are awkward on purpose: 72 is no multiple of 64."""

    hidden: int = 72
    intermediate: int = 136
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    tied: bool = True
    positions: int = 256
    dtype: torch.dtype = torch.float32
    seed: int = 0
    vocabulary: int = VOCABULARY
    family: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)  # further fields of the config


# One of every family beside Llama, with what is its own; 13 positions are less than a page.
# First what the fused decoder runs, then what needs the kernels one by one.
FUSED_FAMILIES = {
    "bloom": Tiny(family="bloom"),  # six heads: no power of two
    "gpt2": Tiny(family="gpt2"),
    "gpt_neox": Tiny(family="gpt_neox", tied=False, options={"rotary_pct": 0.5}),
    "gpt_neox one after the other": Tiny(
        family="gpt_neox",
        options={"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
    ),
    "mistral": Tiny(family="mistral", options={"sliding_window": 13}),
    "opt": Tiny(family="opt"),
    "opt without biases": Tiny(family="opt", tied=False, options={"enable_bias": False}),
    "phi3": Tiny(family="phi3", options={"sliding_window": 13, "partial_rotary_factor": 0.5}),
    "qwen2": Tiny(family="qwen2"),
    "qwen3": Tiny(family="qwen3", options={"head_dim": 20, "attention_bias": True}),
}
_GEMMA = {"head_dim": 20, "sliding_window": 13, "query_pre_attn_scalar": 24}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_KINDS = ["sliding_attention", "full_attention"]
FAMILIES = {
    **FUSED_FAMILIES,
    "gemma2": Tiny(
        family="gemma2",
        options={**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": Tiny(
        family="gemma3_text",
        options={**_GEMMA, "layer_types": _KINDS, "rope_parameters": _GEMMA3_ROPE},
    ),
    "mixtral": Tiny(family="mixtral", tied=False, options={"num_local_experts": 5}),
    "opt 350m": Tiny(
        family="opt", options={"do_layer_norm_before": False, "word_embed_proj_dim": 40}
    ),
    "opt without a last norm": Tiny(family="opt", options={"_remove_final_layer_norm": True}),
    "qwen3_moe": Tiny(
        family="qwen3_moe",
        layers=3,
        options={
            "decoder_sparse_step": 2,
            "head_dim": 20,
            "moe_intermediate_size": 40,
            "num_experts": 7,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe renormalised": Tiny(
        family="qwen3_moe",
        options={
            "mlp_only_layers": [0],
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}


def save_tiny(directory: Path, tiny: Tiny = Tiny()) -> Path:
    """Write a model directory; equal arguments give equal weights."""
    torch.manual_seed(tiny.seed)
    model = AutoModelForCausalLM.from_config(_config(tiny))
    for name, parameter in model.named_parameters():
        # Wider than the default initialisation, so that layers matter and no two logits tie.
        is_vector = parameter.dim() == 1
        is_gain = is_vector and name.endswith("weight") and "gemma" not in tiny.family  # less one
        mean = 1.0 if is_gain else 0.0
        torch.nn.init.normal_(parameter, mean, std=0.3 if is_vector else 0.15)
    model.to(tiny.dtype).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path, **changes: Any) -> None:
    """Write the tiny tokenizer: byte-level BPE, three special tokens, a chat template."""
    settings = {
        "bos_token": "<|endoftext|>",
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        **changes,
    }
    backend = Tokenizer.from_str(_trained())
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(directory)


def dense_model(directory: Path) -> PreTrainedModel:
    """The oracle: transformers' own model in fp32, read from the same directory."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def pack_directory(
    source: Path, out: Path, kind: str, group: int = 32, others: Mapping[str, str] | None = None
) -> Path:
    """Write `source` with every linear of its blocks packed as `kind`, manifest included.

    `others` are the kinds of those whose names end so.
    Also writes `out`/../`out.name`-dense: the same model with the unpacked weights, in fp32.
    """
    config = json.loads((source / "config.json").read_text())
    transposed = config["model_type"] in CONV1D
    tensors = {n: t.float() for n, t in load_file(source / "model.safetensors").items()}
    dense, linears = dict(tensors), {}
    for name in decoder_spec(config).linear_names:
        weight = tensors.pop(f"{name}.weight")
        own = next((other for end, other in (others or {}).items() if name.endswith(end)), kind)
        linears[name] = _packed(weight.T.contiguous() if transposed else weight, own, group)
        unpacked = linears[name].unpack()
        dense[f"{name}.weight"] = unpacked.T if transposed else unpacked
    for name, linear in linears.items():
        tensors |= {f"{name}.{suffix}": part for suffix, part in linear.tensors().items()}
    _write(source, out.with_name(f"{out.name}-dense"), dense)
    _write(source, out, tensors)
    entries = {
        name: LinearFormat(w.kind, w.shape, group if w.kind.endswith("int4") else None)
        for name, w in linears.items()
    }
    block = QuantizationConfig(entries).to_json()
    edit_json(out / "config.json", lambda config: config.update(quantization_config=block))
    write_manifest(out)
    return out


def write_manifest(directory: Path) -> None:
    """Vouch for every file in the directory, as a finished run would."""
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(directory.iterdir())
        if path.name != "halfweave.json"
    }
    document = {"format_version": 1, "recipe": {}, "provenance": {}, "linears": {}, "files": files}
    write_json(directory / "halfweave.json", document)


def _config(tiny: Tiny) -> PreTrainedConfig:
    backend = Tokenizer.from_str(_trained())
    return AutoConfig.for_model(
        tiny.family,
        vocab_size=tiny.vocabulary,
        hidden_size=tiny.hidden,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        tie_word_embeddings=tiny.tied,
        bos_token_id=backend.token_to_id("<|endoftext|>"),
        eos_token_id=backend.token_to_id(EOS),
        **{**_sizes(tiny), **tiny.options},
    )


def _sizes(tiny: Tiny) -> dict[str, int]:
    """The sizes that families have names of their own for."""
    if tiny.family == "bloom":
        return {"seq_length": tiny.positions}  # four times the hidden size inside, no shared keys
    sizes = {"max_position_embeddings": tiny.positions}
    if tiny.family == "gpt2":
        return {**sizes, "n_inner": tiny.intermediate}
    if tiny.family == "opt":
        return {**sizes, "ffn_dim": tiny.intermediate}
    if tiny.family == "phi3":
        sizes["pad_token_id"] = 0  # the config's own is beyond a small vocabulary
    sizes["intermediate_size"] = tiny.intermediate
    return sizes if tiny.family == "gpt_neox" else {**sizes, "num_key_value_heads": tiny.kv_heads}


@cache
def _trained() -> str:
    """A small byte-level BPE, as the JSON of the tokenizers library."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,  # fewer than the embedding has rows, as real models do
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT * 3, trainer)
    return str(backend.to_str())


def _packed(weight: torch.Tensor, kind: str, group: int) -> PackedLinear:
    if kind == "dense":
        return Dense(weight)
    if kind == "int8":
        return Int8.from_dense(weight)
    keep = _largest_two_of_four(weight)
    if kind == "sparse24":
        return Sparse24.from_dense((weight * keep).to(torch.bfloat16))
    padded = torch.nn.functional.pad(weight * keep, (0, -weight.shape[1] % group))
    groups = padded.view(len(weight), group_count(weight.shape[1], group), group)
    scale = (groups.abs().amax(dim=-1) / 7).clamp_min(1e-4).half()
    codes = torch.round(weight / expand_groups(scale.float(), group, weight.shape[1])).clamp(-8, 7)
    if kind == "int4":
        return Int4.from_codes(codes, scale, group)
    assert kind == "sparse24_int4"
    return Sparse24Int4.from_codes(codes, keep, scale, group)


def _largest_two_of_four(weight: torch.Tensor) -> torch.Tensor:
    fours = weight.abs().view(len(weight), -1, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool)
    return keep.scatter_(-1, fours.topk(2, dim=-1).indices, True).view_as(weight)


def _write(source: Path, out: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A directory like `source` with these tensors."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, out / "model.safetensors", {"format": "pt"})
    edit_json(out / "config.json", lambda config: config.update(dtype="float32"))
