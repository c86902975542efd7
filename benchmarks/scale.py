"""Blocks of models far larger than this machine: makes docs/results/scale.{json,md}.

    python benchmarks/scale.py --work WORK_DIR --tokenizer MODEL

Writes a checkpoint with OPT-175B's exact block shape (Zhang et al., 2205.01068: hidden 12288, FFN
49152), two blocks of random 16-bit weights, shard by shard, and prunes it by `halfweave prune` in a
process of its own; the seconds are those between the shards that it writes, the memory is the
process's peak. What the other 94 blocks would take is projected from these. Of BLOOM-176B (Le Scao
et al., 2211.05100: hidden 14336, 70 blocks) only the plan is made, from headers without weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from halfweave.pruner.pipeline import plan_prune
from halfweave.pruner.recipe import Recipe
from halfweave.runtime.hardware import this_machine, versions
from safetensors.torch import save_file
from scale_page import write_page

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
_GIB = 2**30
_BLOCKS_MADE = 2


@dataclass(frozen=True)
class Opt:
    """Sizes of OPT-175B."""

    hidden: int = 12288
    ffn: int = 49152
    heads: int = 96
    blocks: int = 96
    vocab: int = 50272
    positions: int = 2048

    def config(self, blocks: int) -> dict[str, Any]:
        """Its config.json, with other many blocks."""
        return {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "hidden_size": self.hidden,
            "word_embed_proj_dim": self.hidden,
            "ffn_dim": self.ffn,
            "num_attention_heads": self.heads,
            "num_hidden_layers": blocks,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "dtype": "float16",
        }

    def block(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's tensors, by short name."""
        square = {f"self_attn.{n}_proj": (self.hidden, self.hidden) for n in ("q", "k", "v", "out")}
        linears = {**square, "fc1": (self.ffn, self.hidden), "fc2": (self.hidden, self.ffn)}
        norms = {
            f"{name}.{part}": (self.hidden,)
            for name in ("self_attn_layer_norm", "final_layer_norm")
            for part in ("weight", "bias")
        }
        weights = {f"{name}.weight": shape for name, shape in linears.items()}
        return {**weights, **{f"{n}.bias": shape[:1] for n, shape in linears.items()}, **norms}

    def outside(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all other tensors, by full name."""
        return {
            "model.decoder.embed_tokens.weight": (self.vocab, self.hidden),
            "model.decoder.embed_positions.weight": (self.positions + 2, self.hidden),
            "model.decoder.final_layer_norm.weight": (self.hidden,),
            "model.decoder.final_layer_norm.bias": (self.hidden,),
        }


@dataclass(frozen=True)
class Bloom:
    """Sizes of BLOOM-176B."""

    hidden: int = 14336
    heads: int = 112
    blocks: int = 70
    vocab: int = 250880

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "model_type": "bloom",
            "architectures": ["BloomForCausalLM"],
            "hidden_size": self.hidden,
            "n_head": self.heads,
            "n_layer": self.blocks,
            "vocab_size": self.vocab,
            "dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by full name."""
        hidden = self.hidden
        linears = {
            "self_attention.query_key_value": (3 * hidden, hidden),
            "self_attention.dense": (hidden, hidden),
            "mlp.dense_h_to_4h": (4 * hidden, hidden),
            "mlp.dense_4h_to_h": (hidden, 4 * hidden),
        }
        found: dict[str, tuple[int, ...]] = {
            "transformer.word_embeddings.weight": (self.vocab, hidden)
        }
        for norm in ("word_embeddings_layernorm", "ln_f"):
            found |= {f"transformer.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
        for index in range(self.blocks):
            for name, shape in linears.items():
                found[f"transformer.h.{index}.{name}.weight"] = shape
                found[f"transformer.h.{index}.{name}.bias"] = shape[:1]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                for part in ("weight", "bias"):
                    found[f"transformer.h.{index}.{norm}.{part}"] = (hidden,)
        return found


def write_opt(directory: Path, opt: Opt, tokenizer: Path) -> None:
    """A checkpoint of `_BLOCKS_MADE` blocks, a shard at a time; what is there already stays."""
    directory.mkdir(parents=True, exist_ok=True)
    shards = {"outside": opt.outside()}
    for index in range(_BLOCKS_MADE):
        prefix = f"model.decoder.layers.{index}."
        shards[str(index)] = {prefix + name: shape for name, shape in opt.block().items()}
    placed: dict[str, str] = {}
    for number, shapes in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        placed |= dict.fromkeys(shapes, file)
        if not (directory / file).exists():
            generator = torch.Generator().manual_seed(number)
            tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
            save_file(tensors, directory / f"{file}.part")
            os.replace(directory / f"{file}.part", directory / file)
    index = {"metadata": {}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(opt.config(_BLOCKS_MADE)))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal weights as OPT's are initialised (standard deviation 0.006); gains of 1."""
    if len(shape) == 1:
        gain = "norm.weight" in name
        return torch.full(shape, 1.0 if gain else 0.0, dtype=torch.float16)
    tensor = torch.empty(shape, dtype=torch.float16)
    for rows in tensor.split(1024):
        rows.copy_(0.006 * torch.randn(rows.shape, generator=generator))
    return tensor


def write_headers(directory: Path, bloom: Bloom) -> None:
    """A checkpoint that is all holes: its shards say what is in them, and take no room."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in bloom.tensors().items():
        block = name.split(".")[2] if name.startswith("transformer.h.") else "outside"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = shape
    for file, shapes in shards.items():
        _write_hole(directory / file, shapes)
    placed = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(bloom.config()))


def _write_hole(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def halfweave(*arguments: str) -> dict[str, Any]:
    """Run it; its document."""
    done = subprocess.run(_command(arguments), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _command(arguments: Sequence[str]) -> list[str]:
    command = [str(Path(sys.executable).with_name("halfweave")), *arguments, "--json"]
    print("$", *command, flush=True)
    return command


@dataclass(frozen=True)
class Run:
    """A run, whole or ended after some blocks: when each shard was there, and how large it is."""

    started: float
    written: list[float]
    nbytes: list[int]
    errors: dict[str, float]
    peak_bytes: int


def run_blocks(out: Path, arguments: Sequence[str], blocks: int) -> Run:
    """Prune until so many blocks are finished; the rest is left undone."""
    started = time.time()
    process = subprocess.Popen(_command(arguments), stdout=subprocess.DEVNULL)
    linears: dict[str, Any] | None = None
    while linears is None and process.poll() is None:
        time.sleep(0.5)
        linears = _finished(out, blocks)
    process.terminate()
    process.wait()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    linears = linears or _finished(out, blocks)
    if linears is None:
        raise SystemExit("the run ended before its time; see what it said above")
    shards = sorted(out.glob("model-*.safetensors"))[: blocks + 1]
    return Run(
        started,
        [shard.stat().st_mtime for shard in shards],
        [shard.stat().st_size for shard in shards],
        {name: record["relative_error"] for name, record in linears.items()},
        peak,
    )


def _finished(out: Path, blocks: int) -> dict[str, Any] | None:
    """What is recorded of the linears of so many blocks; None while they are not finished."""
    journal, manifest = out / ".halfweave-journal.jsonl", out / "halfweave.json"
    if manifest.exists():
        whole: dict[str, Any] = json.loads(manifest.read_text())["linears"]
        return whole
    try:
        lines = journal.read_text().rpartition("\n")[0].splitlines()  # the last may be half
    except FileNotFoundError:
        return None
    shards = [json.loads(line)["shard"] for line in lines if line.startswith('{"shard"')]
    if len(shards) <= blocks:
        return None
    return {name: record for shard in shards for name, record in shard["linears"].items()}


def measure(options: argparse.Namespace, opt: Opt) -> dict[str, Any]:
    """Prune the made checkpoint, with what a block took."""
    source, out = options.work / "opt-175b-2-blocks", options.work / "opt-175b-2-blocks-pruned"
    write_opt(source, opt, options.tokenizer)
    shutil.rmtree(out, ignore_errors=True)
    asked = [
        *("prune", str(source), str(out), "--method", options.method),
        *("--calib-windows", str(options.windows), "--calib-length", str(options.length)),
    ]
    plan = halfweave(*asked, "--dry-run")["plan"]
    run = run_blocks(out, asked, options.blocks)
    if not options.keep:
        shutil.rmtree(out)
    seconds = [after - before for before, after in pairwise(run.written)]
    mean = sum(seconds) / len(seconds)
    return {
        "blocks": len(seconds),
        "method": options.method,
        "calibration_tokens": options.windows * options.length,
        "seconds_each_block": [round(each, 1) for each in seconds],
        "seconds_per_block": round(mean, 1),
        "seconds_before_first_block": round(run.written[0] - run.started, 1),
        "bytes_per_block": run.nbytes[1:],
        "peak_rss_gib": round(run.peak_bytes / _GIB, 2),
        "planned_rss_gib": round(plan["peak_memory_bytes"] / _GIB, 2),
        "planned_seconds": round(plan["seconds"], 1),
        "hessian": "full",
        "relative_errors": run.errors,
        "projected_hours_96_blocks": round(opt.blocks * mean / 3600, 1),
    }


def plan_bloom(options: argparse.Namespace, bloom: Bloom) -> dict[str, Any]:
    """What the plan says of the whole model on this machine."""
    source = options.work / "bloom-176b-headers"
    write_headers(source, bloom)
    # The command's dry run would ask for a tokenizer, too.
    plan = plan_prune(source, Recipe(method=options.method, calib_windows=128, calib_length=2048))
    shutil.rmtree(source)
    return {
        "blocks": bloom.blocks,
        "method": options.method,
        "calibration_tokens": plan.calibration_tokens,
        "planned_rss_gib": round(plan.peak_memory_bytes / _GIB, 1),
        "planned_hours": round(plan.seconds / 3600, 1),
        "scratch_gib": round(plan.scratch_bytes / _GIB, 1),
        "input_gib": round(plan.input_bytes / _GIB, 1),
        "output_gib": round(plan.output_bytes / _GIB, 1),
    }


def parse_options() -> argparse.Namespace:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="16 GB for the made model and what comes of it")
    add("--tokenizer", type=Path, required=True, help="model whose tokenizer cuts the text")
    add("--results", type=Path, default=RESULTS, help="where the pages go")
    add("--method", default="sparsegpt", help="of pruning")
    add("--windows", type=int, default=8, help="calibration windows")
    add("--length", type=int, default=512, help="tokens per calibration window")
    add("--blocks", type=int, default=_BLOCKS_MADE, help="stop after so many")
    add("--note", default="", help="what a reader has to know of this run, a sentence")
    add("--keep", action="store_true", help="keep the pruned model")
    return parser.parse_args()


def main() -> None:
    """Measure, plan, write."""
    options, opt, bloom = parse_options(), Opt(), Bloom()
    options.work.mkdir(parents=True, exist_ok=True)
    document = {
        "command": f"make scale ({options.method}, {options.windows} x {options.length} tokens)",
        "hardware": this_machine().line,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "note": options.note,
        "bloom_176b_plan": plan_bloom(options, bloom),
        "opt_175b_block": measure(options, opt),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "scale.json").write_text(json.dumps(document, indent=1) + "\n")
    write_page(options.results)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
