"""The whole pruning job on tiny real directories: what comes out, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from halfweave.errors import (
    CapacityError,
    CheckpointError,
    HalfweaveError,
    RefusedError,
    UnsupportedModel,
    UsageError,
)
from halfweave.files import sha256_file
from halfweave.pruner import plan as plan_module
from halfweave.pruner.device import explained_memory
from halfweave.pruner.masks import is_n_of_m
from halfweave.pruner.oneshot import Progress
from halfweave.pruner.pipeline import plan_prune, prune
from halfweave.pruner.recipe import METHODS, Recipe
from halfweave.pruner.recover import memory as memory_module
from halfweave.pruner.recover.settings import Distillation
from halfweave.pruner.source import Source
from halfweave.runtime.checkpoint import Checkpoint
from support.pruning import TEXT, everything, recipe, set_weight
from support.tiny import Tiny, dense_model, edit_json, save_tiny

Copy = Callable[[Path], Path]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("pattern", "bits", "kind"),
    [
        ("2:4", 16, "sparse24"),
        ("2:4", 4, "sparse24_int4"),
        ("4:8", 16, "dense"),
        ("50%", 16, "dense"),
        ("dense", 4, "int4"),
        ("dense", 8, "int8"),
    ],
)
def test_every_method_and_pattern_makes_a_checkpoint_that_opens(
    tiny_model: Path, tmp_path: Path, method: str, pattern: str, bits: int, kind: str
) -> None:
    result = prune(
        tiny_model, tmp_path / "out", recipe(method=method, pattern=pattern, bits=bits, group=32)
    )
    assert {record.format for record in result.linears.values()} == {kind}
    checkpoint = Checkpoint.open(tmp_path / "out")
    for name, record in result.linears.items():
        weight = checkpoint.linear(name).unpack()
        assert weight.shape == record.shape
        if pattern == "2:4":
            assert is_n_of_m(weight, 2, 4)
        if pattern == "4:8":
            assert is_n_of_m(weight, 4, 8)
        if pattern == "50%":
            assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
        assert record.relative_error is not None and 0 < record.relative_error < 1


def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(
    tiny_model: Path, tmp_path: Path
) -> None:
    mean = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        result = prune(tiny_model, tmp_path / method, recipe(method=method, calib_windows=16))
        errors = [record.relative_error or 0 for record in result.linears.values()]
        mean[method] = sum(errors) / len(errors)
    assert mean["sparsegpt"] < mean["wanda"] < mean["magnitude"]


def test_the_reported_error_is_that_of_the_saved_weights(tiny_model: Path, tmp_path: Path) -> None:
    """Recomputed from the first block's real inputs, gathered by transformers' whole model."""
    from halfweave.pruner.calibrate import load_text, sample_windows
    from halfweave.runtime.tokenizer import Tokenizer

    chosen = recipe(bits=4, group=32, fast=True, reorder=False)
    result = prune(tiny_model, tmp_path / "out", chosen)
    ids = Tokenizer.open(tiny_model).encode(load_text(TEXT).text, special=False)
    windows = sample_windows(ids, chosen.calib_windows, chosen.calib_length, chosen.seed)
    model, seen = dense_model(tiny_model), []
    name = "model.layers.0.mlp.down_proj"
    linear = model.get_submodule(name)
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(windows)
    x = torch.cat(seen).double()
    original = linear.weight.detach().double()
    saved = Checkpoint.open(tmp_path / "out").linear(name).unpack().double()
    expected = ((original - saved) @ x.T).square().sum() / (original @ x.T).square().sum()
    assert result.linears[name].relative_error == pytest.approx(float(expected), rel=1e-3)


def test_later_blocks_are_calibrated_on_the_pruned_ones(tiny_model: Path, tmp_path: Path) -> None:
    """The recorded error of the last block is measured on what the pruned first block sends it."""
    from halfweave.pruner.calibrate import load_text, sample_windows
    from halfweave.runtime.tokenizer import Tokenizer

    chosen = recipe()
    result = prune(tiny_model, tmp_path / "out", chosen)
    checkpoint = Checkpoint.open(tmp_path / "out")
    model, seen = dense_model(tiny_model), []
    for name in result.linears:
        if ".layers.0." in name:
            model.get_submodule(name).weight.data = checkpoint.linear(name).unpack()
    name = "model.layers.1.self_attn.q_proj"
    linear = model.get_submodule(name)
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    ids = Tokenizer.open(tiny_model).encode(load_text(TEXT).text, special=False)
    with torch.no_grad():
        model(sample_windows(ids, chosen.calib_windows, chosen.calib_length, chosen.seed))
    x, original = torch.cat(seen).double(), linear.weight.detach().double()
    saved = checkpoint.linear(name).unpack().double()
    expected = ((original - saved) @ x.T).square().sum() / (original @ x.T).square().sum()
    assert result.linears[name].relative_error == pytest.approx(float(expected), rel=1e-3)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_does_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune(tiny_model, tmp_path / name, recipe(seed=seed))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    shard = "model-00002-of-00003.safetensors"
    assert sha256_file(tmp_path / "a" / shard) != sha256_file(tmp_path / "c" / shard)


def test_the_plan_says_what_will_be_written(tiny_model: Path, tmp_path: Path) -> None:
    for pattern, bits in (("2:4", 16), ("2:4", 4), ("dense", 4), ("50%", 16)):
        chosen = recipe(pattern=pattern, bits=bits, group=64)
        plan = plan_prune(tiny_model, chosen)
        out = tmp_path / f"{pattern.replace(':', '')}{bits}"
        result = prune(tiny_model, out, chosen)
        written = sum(tensor_bytes(file) for file in out.glob("*.safetensors"))
        assert plan.output_bytes == written
        assert [linear.name for linear in plan.linears] == list(result.linears)
        assert [linear.format for linear in plan.linears] == [
            record.format for record in result.linears.values()
        ]


def tensor_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in safetensors.torch.load_file(file).values())


def test_progress_counts_every_linear_once(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    prune(tiny_model, tmp_path / "out", recipe(), progress=seen.append)
    assert [event.done for event in seen] == list(range(1, 15))
    assert {event.total for event in seen} == {14}
    assert seen[-1].eta_seconds == 0


def test_row_1_a_path_that_is_no_model_says_what_was_tried(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, complaint in (
        (tmp_path / "nowhere" / "at" / "all", "does not exist"),
        (tmp_path / "file", "is a file"),
        ("someone/some-model", "does not download"),
    ):
        with pytest.raises(UsageError, match=complaint):
            prune(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_row_3_a_model_without_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        prune(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "mamba"}, "supported: .*llama"),
        ({"model_type": "../llama"}, "supported: .*llama"),
        ({"model_type": None}, "supported: .*llama"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "never run"),
    ],
)
def test_row_4_unknown_and_self_coded_models_are_refused(
    tiny_model: Path, copy_of: Copy, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    model = copy_of(tiny_model)
    edit_json(model / "config.json", lambda config: config.update(change))
    with pytest.raises(UnsupportedModel, match=complaint):
        prune(model, tmp_path / "out", recipe())


def test_row_5_a_width_that_does_not_fit_stays_dense_and_is_reported(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", Tiny(intermediate=70))
    result = prune(model, tmp_path / "out", recipe())
    down = result.linears["model.layers.0.mlp.down_proj"]
    assert (down.format, down.note) == ("dense", "K = 70 is not a multiple of 4")
    original = dense_model(model).get_submodule("model.layers.0.mlp.down_proj").weight
    saved = Checkpoint.open(tmp_path / "out").linear("model.layers.0.mlp.down_proj").unpack()
    assert torch.equal(saved, original)
    with pytest.raises(UsageError, match=r"down_proj: K = 70 .* --strict"):
        prune(model, tmp_path / "strict", recipe(strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_row_6_embeddings_and_head_are_never_touched(tmp_path: Path, tied: bool) -> None:
    model = save_tiny(tmp_path / "model", Tiny(tied=tied))
    prune(model, tmp_path / "out", recipe())
    before = safetensors.torch.load_file(model / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "out" / "model-00001-of-00003.safetensors")
    outside = {name for name in before if ".layers." not in name}
    assert set(after) == outside
    assert ("lm_head.weight" in after) is not tied
    assert all(torch.equal(after[name], before[name]) for name in outside)


def test_row_7_a_weight_that_is_not_a_number_is_named(
    tiny_model: Path, copy_of: Copy, tmp_path: Path
) -> None:
    model, name = copy_of(tiny_model), "model.layers.1.mlp.up_proj"
    set_weight(model, f"{name}.weight", lambda w: w.view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"{name}\.weight is not finite at \[0, 5\]"):
        prune(model, tmp_path / "out", recipe())
    allowed = recipe(allow_nonfinite=True)
    result = prune(model, tmp_path / "out2", allowed)
    assert (result.linears[name].format, result.linears[name].note) == ("dense", "not finite")
    errors = [r.relative_error for n, r in result.linears.items() if n != name]
    assert all(error is not None and error == error for error in errors)


def test_row_7_a_norm_that_is_not_a_number_is_never_allowed(
    tiny_model: Path, copy_of: Copy, tmp_path: Path
) -> None:
    model = copy_of(tiny_model)
    set_weight(model, "model.norm.weight", lambda w: w[3:4].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not finite at \[3\]"):
        prune(model, tmp_path / "out", recipe(allow_nonfinite=True))


def test_row_10_a_model_that_is_24_already_is_repacked(
    tiny_model: Path, tmp_path: Path, copy_of: Copy
) -> None:
    model = copy_of(tiny_model)

    def halve(w: torch.Tensor) -> None:
        w.view(len(w), -1, 4)[..., 1:3] = 0

    names = [linear.name for linear in plan_prune(model, recipe()).linears]
    for name in names:
        set_weight(model, f"{name}.weight", halve)
    result = prune(model, tmp_path / "out", recipe())
    checkpoint, original = Checkpoint.open(tmp_path / "out"), dense_model(model)
    for name in names:
        assert result.linears[name].method == "repack"
        assert "nothing to do" in result.linears[name].note
        assert torch.equal(checkpoint.linear(name).unpack(), original.get_submodule(name).weight)


def test_row_10_a_packed_or_foreign_model_is_refused(packed_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="quantized or pruned already"):
        prune(packed_model, tmp_path / "out", recipe())


def test_row_11_other_peoples_files_are_never_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RefusedError, match="never overwritten"):
            prune(tiny_model, out, recipe(), overwrite=overwrite)
    assert everything(out) == {"thesis.tex": b"years of work"}


def test_row_11_the_input_is_never_the_output(tiny_model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tiny_model)
    before = everything(tiny_model)
    for out in (tiny_model, link):
        with pytest.raises(RefusedError, match="the input is never modified"):
            prune(tiny_model, out, recipe(), overwrite=True)
    assert everything(tiny_model) == before


def test_row_11_a_finished_model_is_replaced_only_when_asked(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune(tiny_model, out, recipe())
    (out / "notes.txt").write_text("mine")
    before = everything(out)
    for resume in (False, True):
        with pytest.raises(RefusedError, match="a finished model") as caught:
            prune(tiny_model, out, recipe(seed=1), resume=resume)
        assert "--overwrite" in str(caught.value.hint)
    assert everything(out) == before
    prune(tiny_model, out, recipe(seed=1), overwrite=True)
    prune(tiny_model, tmp_path / "fresh", recipe(seed=1))
    assert everything(out) == {**everything(tmp_path / "fresh"), "notes.txt": b"mine"}


def test_row_12_and_16_a_run_that_cannot_fit_is_refused_with_both_numbers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "available_memory_bytes", lambda _: 2**20)
    with pytest.raises(CapacityError, match=r"GiB of memory, 0\.0 GiB are available"):
        prune(tiny_model, tmp_path / "a", recipe())
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CapacityError, match=r"needs \d+ bytes, 1000 are free"):
        prune(tiny_model, tmp_path / "b", recipe())


def test_a_run_that_is_refused_leaves_the_model_it_was_to_replace(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, short = tmp_path / "out", tmp_path / "short.txt"
    prune(tiny_model, out, recipe())
    before = everything(out)
    short.write_text("too short")
    distilled = recipe(recover="distill", recover_tokens=4096)
    budget = recipe(target_bytes=0.9, calib_windows=16)
    with pytest.raises(UsageError, match="1024 tokens are one step"):
        prune(tiny_model, out, replace(distilled, bits=4, recover_tokens=1024), overwrite=True)
    for chosen in (recipe(), distilled, budget):
        with pytest.raises(UsageError, match=r"calibration text|held-out windows"):
            prune(tiny_model, out, replace(chosen, calib=str(short)), overwrite=True)
    monkeypatch.setattr(memory_module, "available_memory_bytes", lambda *_: 2**20)
    with pytest.raises(CapacityError, match="the recovery needs"):
        prune(tiny_model, out, distilled, overwrite=True)
    monkeypatch.setattr(plan_module, "available_memory_bytes", lambda *_: 2**20)
    with pytest.raises(CapacityError, match="the run needs"):
        prune(tiny_model, out, recipe(), overwrite=True)
    assert everything(out) == before


def test_the_room_that_overwriting_makes_counts_as_free(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(tiny_model, out, recipe())
    (out / "notes.txt").write_text("mine, and here to stay")
    before = everything(out)
    ours = sum(len(data) for name, data in before.items() if name != "notes.txt")
    # Of a run that needs more than the model that is there.
    chosen = recipe(recover="distill", recover_tokens=1024)
    plan = plan_prune(tiny_model, chosen)
    least = plan.output_bytes + plan.scratch_bytes - ours
    usage = shutil.disk_usage(tmp_path)._replace(free=least - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CapacityError, match=rf"{least - 1} are free .* {ours} used in it already"):
        prune(tiny_model, out, chosen, overwrite=True)
    assert everything(out) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=least))
    prune(tiny_model, out, chosen, overwrite=True)
    assert (out / "notes.txt").exists()


def test_going_on_and_starting_over_exclude_each_other(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--resume goes on with what --overwrite removes"):
        prune(tiny_model, tmp_path / "out", recipe(), resume=True, overwrite=True)
    assert not (tmp_path / "out").exists()


def test_row_17_awkward_names_and_a_read_only_source_work(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "a model\nwith ünïcode"
    shutil.copytree(tiny_model, source)
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = tmp_path / "out put ☂\n2"
    prune(source, out, recipe())
    assert Checkpoint.open(out).manifest is not None


def test_a_tensor_that_contradicts_the_config_is_named(
    tiny_model: Path, copy_of: Copy, tmp_path: Path
) -> None:
    model = copy_of(tiny_model)
    edit_json(model / "config.json", lambda config: config.update(intermediate_size=64))
    with pytest.raises(HalfweaveError, match=r"model\.layers\.0 does not fit config\.json"):
        prune(model, tmp_path / "out", recipe())


def test_the_manifest_and_card_say_what_was_done_and_no_path(
    tiny_model: Path, tmp_path: Path
) -> None:
    prune(tiny_model, tmp_path / "out", recipe(bits=4, group=32))
    manifest = json.loads((tmp_path / "out" / "halfweave.json").read_text())
    assert Recipe.from_json(manifest["recipe"]) == recipe(bits=4, group=32)
    assert manifest["provenance"]["base"]["name"] == "tiny"
    assert len(manifest["linears"]) == 14
    for name, entry in manifest["files"].items():
        assert sha256_file(tmp_path / "out" / name) == entry["sha256"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "admm" in card and "speed | not measured" in card
    assert str(tmp_path) not in card and str(tmp_path) not in json.dumps(manifest)


def test_what_is_stored_dense_loads_in_plain_transformers(tiny_model: Path, tmp_path: Path) -> None:
    result = prune(tiny_model, tmp_path / "out", recipe(pattern="4:8"))
    model = dense_model(tmp_path / "out")
    for name in result.linears:
        assert is_n_of_m(model.get_submodule(name).weight, 4, 8)


def test_calibration_windows_are_no_longer_than_the_context(tiny_model: Path) -> None:
    plan_prune(tiny_model, recipe(calib_length=256))
    with pytest.raises(UsageError, match="calib_length 257 is more than the 256 positions"):
        plan_prune(tiny_model, recipe(calib_length=257))


def test_choices_of_linears_that_the_model_does_not_have_are_refused(tiny_model: Path) -> None:
    linear = "model.layers.1.mlp.up_proj"
    plan_prune(tiny_model, recipe(choices={linear: "int4"}))
    with pytest.raises(
        UsageError, match=r"1 of the .* have, model\.layers\.2\.mlp\.up_proj for one"
    ):
        plan_prune(tiny_model, recipe(choices={linear: "int4", linear.replace("1", "2"): "int4"}))


@pytest.mark.parametrize("kind", [{"bits": 4}, {"pattern": "4:8"}])
@pytest.mark.parametrize(
    ("who", "words"),
    [
        ({"max_ppl_ratio": 1.1}, "a budget chooses pattern and bits"),
        ({"target_bytes": 0.5, "choices": {"a": "int4"}}, "a budget chooses pattern and bits"),
        ({"choices": {"a": "int4"}}, "choices give each linear its pattern and bits"),
    ],
)
def test_a_pattern_or_bits_beside_formats_of_each_linear_are_refused(
    kind: dict[str, object], who: dict[str, object], words: str
) -> None:
    for attempt in (
        lambda: recipe(**kind, **who),
        lambda: recipe(**who).changed(kind),
        lambda: recipe(**kind).changed(who),
        lambda: Recipe.from_json({**recipe(**who).to_json(), **kind}),
        lambda: recipe(**who).changed({name: getattr(Recipe, name) for name in kind}),
    ):
        with pytest.raises(UsageError, match=words):
            attempt()


def test_a_new_budget_replaces_the_old_one_and_what_it_chose() -> None:
    old = recipe(target_bytes=0.5, choices={"a": "int4"}, group=32)
    assert old.is_for_budget and not old.has_budget
    assert old.changed({"max_ppl_ratio": 1.1}) == recipe(max_ppl_ratio=1.1, group=32)
    assert old.changed({"target_bytes": 0.5}) == recipe(target_bytes=0.5, group=32)
    assert old.changed({"target_bytes": 0.0, "bits": 4}) == recipe(bits=4, group=32)
    assert old.changed({"seed": 3}) == replace(old, seed=3)
    assert recipe(bits=4).changed({"max_ppl_ratio": 0.0}) == recipe(bits=4)
    with pytest.raises(UsageError, match="two budgets"):
        old.changed({"max_ppl_ratio": 1.1, "target_bytes": 0.5})


def test_the_plan_s_memory_is_that_of_the_training_where_that_takes_more(
    tiny_model: Path,
) -> None:
    plain = plan_prune(tiny_model, recipe()).peak_memory_bytes
    trained = plan_prune(tiny_model, recipe(recover="distill")).peak_memory_bytes
    settings = Distillation().fitted(256)
    needed = memory_module.needed_bytes(Source.open(tiny_model), settings, 2**30)
    assert plain < trained == needed


def test_memory_is_that_of_the_device(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def little(device: torch.device) -> int:
        seen.append(device)
        return 2**20

    gpu = torch.device("cuda:3")  # which need not be there
    monkeypatch.setattr(plan_module, "parse_device", {"cpu": gpu}.__getitem__)
    monkeypatch.setattr(plan_module, "available_memory_bytes", little)
    monkeypatch.setattr(memory_module, "available_memory_bytes", little)
    with pytest.raises(CapacityError):
        prune(tiny_model, tmp_path / "out", recipe())
    with pytest.raises(CapacityError) as caught:
        memory_module.check_memory(2**30, gpu)
    assert seen == [gpu, gpu]
    assert "--recover blocks" in str(caught.value.hint)


def test_a_full_gpu_is_told_with_what_helps_in_any_step() -> None:
    full = pytest.raises(CapacityError, match="GPU's memory is full: no room")
    with full as caught, explained_memory():
        raise torch.OutOfMemoryError("no room\nand much detail")
    assert re.search(r"--resume .* --overwrite .* --device cpu", str(caught.value.hint))
