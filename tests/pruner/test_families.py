"""Every family is pruned as transformers computes it, and comes out as a model of its kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from halfweave.errors import RefusedError, UnsupportedModel
from halfweave.files import read_json
from halfweave.pruner import cost
from halfweave.pruner.coverage import coverage
from halfweave.pruner.export import export
from halfweave.pruner.family import FreeChannels
from halfweave.pruner.methods.base import InputStatistics
from halfweave.pruner.pipeline import plan_prune, prune
from halfweave.pruner.reorder import reorder_module
from halfweave.pruner.source import Source, Trained
from halfweave.pruner.starved import is_starved, shrunk
from halfweave.pruner.stream import BlockStream
from halfweave.runtime.checkpoint import Checkpoint
from halfweave.runtime.decoder import Decoder
from halfweave.runtime.families import decoder_spec
from halfweave.runtime.model import load_model
from safetensors.torch import load_file, save_file
from support.pruning import everything, recipe
from support.tiny import FAMILIES, Tiny, dense_model, edit_json, save_tiny
from torch import Tensor, nn

# Of every family, all blocks alike: the pruner takes none among whose experts are blocks without.
MODELS = {
    "llama": Tiny(),
    **{name: tiny for name, tiny in FAMILIES.items() if tiny.family != "qwen3_moe"},
    "qwen3_moe": Tiny(
        family="qwen3_moe",
        options={
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "head_dim": 16,
        },
    ),
}
PATTERNS = {
    "2:4": {},
    "4:8": {"pattern": "4:8"},
    "50%": {"pattern": "50%"},
    "2:4+int4": {"bits": 4, "group": 32},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_tiny(root / str(i), tiny) for i, (name, tiny) in enumerate(MODELS.items())}


def windows(count: int, length: int = 40) -> Tensor:
    return torch.randint(0, 300, (count, length), generator=torch.Generator().manual_seed(1))


def leaving(directory: Path, ids: Tensor) -> list[Tensor]:
    """What leaves each block of transformers' model."""
    model, found = dense_model(directory), []

    def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    for block in model.get_submodule(Source.open(directory).family.blocks).children():
        block.register_forward_hook(keep)
    with torch.inference_mode():
        model(ids)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_computes_what_transformers_does(
    name: str, directories: dict[str, Path]
) -> None:
    ids = windows(5)
    expected = leaving(directories[name], ids)
    source = Source.open(directories[name])
    stream = BlockStream(source, ids, held_out=2)
    stream_alone = BlockStream(source, ids[:1])
    for index in range(source.block_count):
        block = stream.load_block(index, source.block_tensors(index))
        stream.advance(block)
        assert (stream.hidden - expected[index]).abs().max() < 1e-4
        again = stream_alone.load_block(index, source.block_tensors(index))
        stream_alone.advance(again)
        assert (stream_alone.hidden - expected[index][:1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_channels_called_free_may_come_in_any_order(
    name: str, directories: dict[str, Path]
) -> None:
    source = Source.open(directories[name])
    stream = BlockStream(source, windows(2))
    block = stream.load_block(0, source.block_tensors(0))
    before = stream.run(block, stream.hidden)
    free = source.family.free
    assert {channels.reader for channels in free} <= set(source.family.linears)
    for channels in free:
        count = block.get_parameter(f"{channels.reader}.weight").shape[1]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        changed = block.get_parameter(f"{channels.makers[0]}.weight").clone()
        reorder_module(block, channels, order)
        assert not torch.equal(changed, block.get_parameter(f"{channels.makers[0]}.weight"))
    assert (stream.run(block, stream.hidden) - before).abs().max() < 1e-4


@pytest.fixture(scope="module")
def sparse(
    directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same models with zeros where two of every four weights are smallest."""
    root = tmp_path_factory.mktemp("sparse")
    return {
        name: with_zeros(directory, root / str(i))
        for i, (name, directory) in enumerate(directories.items())
    }


def with_zeros(directory: Path, out: Path) -> Path:
    copytree(directory, out)
    source, tensors = Source.open(directory), load_file(directory / "model.safetensors")
    for index in range(source.block_count):
        for linear in source.linear_names(index):
            weight = tensors[f"{linear}.weight"]
            turned = weight.T.contiguous() if source.family.transposed else weight
            zeros = turned.abs().view(-1, 4).topk(2, largest=False).indices
            turned.view(-1, 4).scatter_(1, zeros, 0)
            tensors[f"{linear}.weight"] = turned.T if source.family.transposed else turned
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_stored_and_exported_is_the_model_that_was_pruned(
    name: str, pattern: str, sparse: dict[str, Path], tmp_path: Path
) -> None:
    """Of a model that has its zeros already nothing is lost but what 4 bits round."""
    model, ids = sparse[name], windows(3)
    prune(model, tmp_path / "pruned", recipe(**PATTERNS[pattern], calib_windows=8))
    export(tmp_path / "pruned", tmp_path / "plain", dtype="float32")
    source = Source.open(tmp_path / "plain")
    for index in range(source.block_count):
        tensors = source.block_tensors(index)
        for linear in source.linear_names(index):
            assert 0.4 < float((tensors[f"{linear}.weight"] != 0).float().mean()) < 0.51, linear
    found, expected = leaving(tmp_path / "plain", ids)[-1], leaving(model, ids)[-1]
    lost = float((found - expected).norm() / expected.norm())
    assert lost < {"2:4": 1e-5, "4:8": 1e-5, "50%": 0.5, "2:4+int4": 0.7}[pattern]
    plain = dense_model(tmp_path / "plain")
    checkpoint = Checkpoint.open(tmp_path / "pruned")
    spec = decoder_spec(checkpoint.config)
    decoder = Decoder(checkpoint, spec, torch.float32, torch.device("cpu"))
    served = decoder.logits(decoder.forward(ids[0], decoder.new_cache()))
    with torch.inference_mode():
        assert (served - plain(ids[:1]).logits[0]).abs().max() < 1e-4
    text = plain.generate(ids[:1, :8], max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 12)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bloom"])
def test_layers_lose_less_than_by_magnitude(
    name: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    errors = {}
    for method in ("admm", "magnitude"):
        result = prune(directories[name], tmp_path / method, recipe(method=method))
        errors[method] = {n: r.relative_error for n, r in result.linears.items()}
    first = Source.open(directories[name]).linear_names(0)
    assert all(errors["admm"][n] < errors["magnitude"][n] for n in first)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"pattern": "50%"}),
        ("mixtral", {}),
        ("opt", {}),
        ("opt", {"pattern": "50%", "recover": "blocks"}),
        ("opt", {"method": "sparsegpt"}),
    ],
    ids=str,
)
def test_a_resumed_run_gives_the_same_bytes(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """In 16 bits, with biases: whatever a weight is held in, it gives the same bits."""
    whole, cut, asked = tmp_path / "whole", tmp_path / "cut", recipe(**changes)
    tiny = replace(MODELS[name], dtype=torch.bfloat16)
    if name == "opt":  # small products give the same bits in any way
        tiny = replace(tiny, hidden=192, intermediate=384)
    model = save_tiny(tmp_path / "model", tiny)
    prune(model, whole, asked)

    first_block = len(Source.open(model).family.linears)

    def kill(step: object) -> None:
        if getattr(step, "done", 0) > first_block:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prune(model, cut, asked, progress=kill)
    resumed = prune(model, cut, asked, resume=True)
    assert resumed.resumed_blocks == 1
    assert everything(cut) == everything(whole)


def test_weights_of_gpt2_stay_as_they_were_stored(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    """[K, N] where they are floats, as transformers reads them; packed ones are [N, K]."""
    half = prune(directories["gpt2"], tmp_path / "half", recipe(pattern="50%"))
    name = "transformer.h.0.mlp.c_fc"
    assert Checkpoint.open(half.path).shape(f"{name}.weight") == (72, 136)
    assert half.linears[name].shape == (136, 72)
    packed = prune(directories["gpt2"], tmp_path / "packed", recipe())
    assert Checkpoint.open(packed.path).linear(name).shape == (136, 72)
    with pytest.raises(RefusedError, match="other modules"):
        export(packed.path, tmp_path / "theirs", "compressed-tensors")


def test_blocks_of_experts_are_tuned_too(directories: dict[str, Path], tmp_path: Path) -> None:
    tuned = prune(directories["mixtral"], tmp_path / "out", recipe(recover="blocks"))
    assert any("tuned with its block" in record.note for record in tuned.linears.values())


def test_what_experts_saw_is_told(directories: dict[str, Path], tmp_path: Path) -> None:
    result = prune(directories["qwen3_moe"], tmp_path / "out", recipe())
    attention, experts = {}, {}
    for name, record in result.linears.items():
        (experts if ".experts." in name else attention)[name] = record
    assert all(record.tokens is None for record in attention.values())
    ups = [r for n, r in experts.items() if n.startswith("model.layers.0.") and "up_proj" in n]
    assert sum(record.tokens or 0 for record in ups) == 2 * 4 * 32  # two experts a token
    manifest = read_json(tmp_path / "out" / "halfweave.json")["linears"]
    assert {n: e["tokens"] for n, e in manifest.items()} == {
        n: r.tokens for n, r in result.linears.items()
    }
    said = coverage(result.linears.values())
    assert said is not None
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert f"of {len(experts)} linears fewer than they have inputs, and were" in said


def test_experts_that_saw_nothing_are_pruned_by_what_their_layer_saw(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    """A router without weights sends every token to the same two experts."""
    model = tmp_path / "model"
    copytree(directories["mixtral"], model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.gate.weight"].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    errors = {}
    for method in ("admm", "magnitude"):
        result = prune(model, tmp_path / method, recipe(method=method, calib_windows=16))
        unseen = {n: r for n, r in result.linears.items() if "layers.0." in n and r.tokens == 0}
        assert len(unseen) == 3 * 3  # of five experts two see all
        errors[method] = [r.relative_error for n, r in unseen.items() if not n.endswith("w2")]
    pairs = zip(errors["admm"], errors["magnitude"], strict=True)
    assert all(ours < theirs for ours, theirs in pairs)  # type: ignore[operator]


def test_a_starved_hessian_leans_on_the_layers_the_more_the_fewer_its_tokens() -> None:
    torch.manual_seed(0)
    inputs, others = torch.randn(3, 8), torch.randn(500, 8)
    seen = InputStatistics(inputs.T @ inputs / 3, 3)
    layer = InputStatistics(others.T @ others / 500, 500)
    assert is_starved(seen)
    assert not is_starved(layer)
    assert torch.allclose(shrunk(seen, layer).hessian, 3 / 8 * seen.hessian + 5 / 8 * layer.hessian)
    alone = shrunk(seen, None).hessian
    assert torch.linalg.eigvalsh(alone)[0] > 0.1 * alone.diagonal().mean()
    assert torch.isclose(alone.trace(), seen.hessian.trace())
    nothing = shrunk(InputStatistics(torch.zeros(8, 8), 0), None)
    assert torch.equal(nothing.hessian, torch.eye(8))


def test_fused_makers_follow_in_each_of_their_parts() -> None:
    both = nn.ModuleDict({"both": nn.Linear(4, 6), "down": nn.Linear(3, 4)})
    x = torch.randn(2, 4)

    def run() -> Tensor:
        gate, up = both["both"](x).chunk(2, dim=-1)
        return both["down"](gate.relu() * up)  # type: ignore[no-any-return]

    before = run()
    reorder_module(
        both.requires_grad_(False), FreeChannels(("both",), "down"), torch.tensor([2, 0, 1])
    )
    assert torch.allclose(run(), before, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "beginning", "more"),
    [
        ("gpt2", "transformer.", {"h.0.attn.bias": 4, "h.1.attn.masked_bias": 1}),
        ("bloom", "transformer.", {}),
        ("opt", "model.", {}),
    ],
)
def test_names_of_the_hub_are_those_of_transformers(
    name: str, beginning: str, more: dict[str, int], directories: dict[str, Path], tmp_path: Path
) -> None:
    """Without their beginning, and with buffers that are no weights."""
    model = tmp_path / "model"
    copytree(directories[name], model)
    tensors = {
        stored.removeprefix(beginning): tensor
        for stored, tensor in load_file(model / "model.safetensors").items()
    }
    tensors |= {buffer: torch.ones(size) for buffer, size in more.items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    prune(model, tmp_path / "out", recipe())
    prune(directories[name], tmp_path / "clean", recipe())
    found, clean = (everything(tmp_path / each) for each in ("out", "clean"))
    assert {n for n in found if n.startswith("model-")} == {
        n for n in clean if n.startswith("model-")
    }
    assert all(found[n] == clean[n] for n in found if n.startswith("model-"))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt2", {"recover": "distill"}, "stored transposed"),
        ("mixtral", {"recover": "distill"}, "it has experts"),
        ("gemma2", {"recover": "distill"}, "caps its scores"),
        ("gemma2", {"max_ppl_ratio": 1.5}, "caps its scores"),
        ("opt 350m", {"target_bytes": 0.5}, "no last norm"),
        ("mixtral", {"target_bytes": 0.5}, "it has experts"),
    ],
)
def test_what_a_family_cannot_have_is_refused_before_work(
    name: str,
    changes: dict[str, object],
    said: str,
    directories: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        prune(directories[name], tmp_path / "out", recipe(**changes))
    assert not list((tmp_path / "out").glob("model-*"))


@pytest.mark.parametrize("name", ["bloom", "gpt_neox", "phi3"])
def test_a_budget_chooses_formats_in_other_families(
    name: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    asked = recipe(target_bytes=0.6, calib_windows=8, bits=16)
    result = prune(directories[name], tmp_path / "out", asked)
    assert result.budget is not None
    assert result.budget.share_of_bytes <= 0.62


def test_a_trained_model_begins_with_its_own_norm_behind_the_embedding(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    prune(directories["bloom"], tmp_path / "out", recipe(method="magnitude"))
    norm = "transformer.word_embeddings_layernorm."
    file = Checkpoint.open(tmp_path / "out").file_of(f"{norm}weight")
    tensors = load_file(file)
    doubled = {name: 2 * tensors[name] for name in (f"{norm}weight", f"{norm}bias")}
    save_file({**tensors, **doubled}, file, {"format": "pt"})
    source = Source.open(directories["bloom"])
    trained = Trained.of(source, Checkpoint.open(tmp_path / "out", verify=False))
    before, after = (BlockStream(each, windows(2)).hidden for each in (source, trained))
    torch.testing.assert_close(after, 2 * before)


def test_a_plan_counts_an_experts_share(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_flops_per_second", lambda: 1e9)
    seconds = {}
    for chosen in (1, 2, 4):
        model = tmp_path / str(chosen)
        copytree(directories["qwen3_moe"], model)
        edit_json(model / "config.json", lambda c, n=chosen: c.update(num_experts_per_tok=n))
        seconds[chosen] = plan_prune(model, recipe(method="wanda", calib_windows=64)).seconds
    assert seconds[4] - seconds[2] == pytest.approx(2 * (seconds[2] - seconds[1]))
    assert seconds[2] > seconds[1]


def test_mixed_blocks_are_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", MODELS["qwen3_moe"])
    edit_json(model / "config.json", lambda config: config.update(mlp_only_layers=[0]))
    with pytest.raises(UnsupportedModel, match="mlp_only_layers"):
        Source.open(model)
    assert json.loads((model / "config.json").read_text())["mlp_only_layers"] == [0]


def test_what_cannot_be_served_can_be_pruned_and_exported(tmp_path: Path) -> None:
    """Phi-3 with 128k positions."""
    factors = [1.0] * 6
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    rope = {**scaling, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    model = save_tiny(tmp_path / "model", Tiny(family="phi3", options=options))
    prune(model, tmp_path / "pruned", recipe())
    export(tmp_path / "pruned", tmp_path / "plain")
    assert dense_model(tmp_path / "plain")(windows(1)).logits.shape == (1, 40, 320)
    with pytest.raises(UnsupportedModel, match="longrope"):
        load_model(tmp_path / "pruned")


@pytest.mark.parametrize("beginning", ["", "microsoft/Phi-3-mini-4k-instruct--"])
def test_phi3_asks_for_code_that_transformers_has_taken_over(
    beginning: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    """As its configs of the hub do; nothing of it is run, and the pruned model asks for none."""
    model, asked = (
        tmp_path / "model",
        {
            "AutoConfig": f"{beginning}configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": f"{beginning}modeling_phi3.Phi3ForCausalLM",
        },
    )
    copytree(directories["phi3"], model)
    edit_json(model / "config.json", lambda config: config.update(auto_map=asked))
    load_model(model)
    prune(model, tmp_path / "out", recipe())
    assert "auto_map" not in read_json(tmp_path / "out" / "config.json")
    asked["AutoModelForCausalLM"] = "modeling_phi3.Another"
    edit_json(model / "config.json", lambda config: config.update(auto_map=asked))
    with pytest.raises(UnsupportedModel, match="never run"):
        Source.open(model)
