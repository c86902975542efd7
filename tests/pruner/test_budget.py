"""Budgets on a tiny trained model: what is predicted, chosen, and in the end measured."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from halfweave.errors import CheckpointError, RefusedError, UsageError
from halfweave.kernels.formats import Dense, Int8
from halfweave.kernels.shards import read_shard
from halfweave.pruner.budget import candidates
from halfweave.pruner.budget.candidates import possible_formats
from halfweave.pruner.budget.check import check_budget
from halfweave.pruner.budget.choose import BudgetPlan, BudgetProgress, choose_formats
from halfweave.pruner.budget.perplexity import Ratio, window_losses
from halfweave.pruner.budget.sensitivity import output_sensitivity, predicted_loss
from halfweave.pruner.budget.sizes import bytes_before, bytes_that_stay, stored_bytes
from halfweave.pruner.budget.windows import BudgetWindows, cut_windows
from halfweave.pruner.methods.base import Method
from halfweave.pruner.pipeline import plan_prune, prune
from halfweave.pruner.plan import make_plan
from halfweave.pruner.recipe import CHOICES, Recipe
from halfweave.pruner.source import Source
from halfweave.runtime.model import Model, load_model
from halfweave.runtime.tokenizer import Tokenizer
from support.kill_every_write import in_child
from support.pruning import TEXT, recipe, set_weight
from support.tiny import Tiny, dense_model, save_tiny
from torch import Tensor

Copy = Callable[[Path], Path]
Told = Callable[[BudgetProgress], None]
TINY = Tiny(hidden=48, intermediate=96, heads=4, kv_heads=2, layers=2)
RATIO = 1.02  # so small a model, trained so little, hardly notices more


@dataclass(frozen=True)
class Case:
    """A model that has learned something, and windows of the text that it learned from."""

    path: Path
    source: Source
    windows: BudgetWindows


def asked(**changes: object) -> Recipe:
    return recipe(**{"group": 32, "calib_windows": 16, "calib_length": 32, **changes})


def token_ids(model: Path) -> list[int]:
    return Tokenizer.open(model).encode(TEXT.read_text(), special=False)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A few seconds of training make pruning hurt; on random weights a ratio means nothing."""
    path = save_tiny(tmp_path_factory.mktemp("budget") / "model", TINY)
    ids = torch.tensor(token_ids(path))
    model = dense_model(path).train()
    for parameter in model.parameters():
        parameter.data.mul_(0.3 if parameter.dim() == 2 else 1)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        starts = torch.randint(0, len(ids) - 32, (16,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + 32] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(path)
    source = Source.open(path)
    return Case(path, source, cut_windows(ids.tolist(), asked()))


@pytest.fixture(scope="module")
def chosen(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[BudgetPlan, Path]:
    """An undisturbed choice under a ratio, and its scratch directory."""
    scratch = tmp_path_factory.mktemp("scratch") / "budget"
    plan = choose_formats(case.source, asked(max_ppl_ratio=RATIO), case.windows, scratch)
    return plan, scratch


def served_losses(model: Model, windows: Tensor) -> list[float]:
    """The oracle: the runtime's own decoder, one window at a time."""
    losses = []
    for tokens in windows:
        cache = model.decoder.new_cache(len(tokens))
        scores = model.decoder.logits(model.decoder.forward(tokens[:-1], cache)).float()
        losses.append(float(torch.nn.functional.cross_entropy(scores, tokens[1:], reduction="sum")))
    return losses


# --- windows -----------------------------------------------------------------------------------


def test_the_four_sets_of_windows_share_no_token() -> None:
    ids = list(range(32 * 100))
    windows = cut_windows(ids, asked())
    parts = (windows.fit, windows.check, windows.search, windows.judge)
    everything = torch.cat(parts).flatten().tolist()
    assert [len(part) for part in parts] == [16, 2, 12, 12]
    assert len(set(everything)) == len(everything)
    for part in (windows.search, windows.judge):  # both of all of the text
        places = [0, *part[:, 0].tolist(), len(ids)]
        assert places == sorted(places)
        assert max(b - a for a, b in itertools.pairwise(places)) <= len(ids) / 12 + 32


def test_a_text_that_is_too_short_says_how_much_is_needed() -> None:
    with pytest.raises(UsageError, match=r"has 100 tokens; 16 windows of 32 .* need 640") as caught:
        cut_windows(list(range(100)), asked())
    assert "--calib-windows" in str(caught.value.hint)


# --- what is predicted and measured ------------------------------------------------------------


def test_sensitivities_are_those_of_autograd_on_the_whole_model(case: Case) -> None:
    windows = case.windows.fit[:3]
    found = output_sensitivity(case.source, windows, seed=5)
    model, generator = dense_model(case.path), torch.Generator().manual_seed(5)
    outputs: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in found:
            module.register_forward_hook(
                lambda m, args, out, name=name: (
                    (out.retain_grad(), outputs.update({name: out}))[2:] or None
                )
            )
    for window in windows:
        scores = model(input_ids=window[None]).logits[0]
        labels = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
        for name, output in outputs.items():
            assert output.grad is not None
            sums[name] = sums.get(name, 0) + output.grad[0].square().sum(dim=0)
    assert sums.keys() == found.keys() and len(found) == 14
    for name, value in found.items():
        torch.testing.assert_close(value, sums[name] / windows.numel(), rtol=1e-3, atol=1e-9)


def test_the_predicted_loss_is_that_of_a_small_change(case: Case) -> None:
    """In the mean over random changes; to the right unit, which an order of magnitude shows."""
    name, windows = "model.layers.1.mlp.down_proj", case.windows.fit
    sensitivity = output_sensitivity(case.source, windows, seed=1)[name]
    model, inputs = dense_model(case.path), []
    linear = model.get_submodule(name)
    hook = linear.register_forward_hook(lambda m, args, out: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        truth = model(input_ids=windows).logits.log_softmax(-1)
        hook.remove()
        hessian = inputs[0].T @ inputs[0] / len(inputs[0])
        weight, measured, predicted = linear.weight.data.clone(), 0.0, 0.0
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            change = 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
            linear.weight.data = weight + change
            scores = model(input_ids=windows).logits.log_softmax(-1)
            measured += float((truth.exp() * (truth - scores)).sum(-1).mean())
            predicted += predicted_loss(change, hessian, sensitivity)
    assert 0.5 < predicted / measured < 2


def test_losses_of_a_model_are_the_runtimes(case: Case) -> None:
    losses = window_losses(case.source, case.windows.judge, case.source.block_tensors)
    expected = served_losses(load_model(case.path, "float32"), case.windows.judge)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_ratio_is_of_perplexities_and_its_error_that_of_paired_windows() -> None:
    ratio = Ratio.of([12.0, 24.0, 15.0], [10.0, 20.0, 15.0], length=11)
    assert ratio.value == pytest.approx(torch.tensor(0.2).exp().item())
    assert ratio.error == pytest.approx(torch.tensor([0.2, 0.4, 0.0]).std().item() / 3**0.5)


def test_more_bytes_lose_less_in_every_linear(chosen: tuple[BudgetPlan, Path]) -> None:
    for linear in chosen[0].linears:
        formats = [option.format for option in linear.options]
        assert formats == ["sparse24_int4", "int4", "int8", "dense"]
        assert [o.bytes for o in linear.options] == sorted(o.bytes for o in linear.options)
        losses = [o.loss for o in linear.options]
        assert losses == sorted(losses, reverse=True) and losses[-1] == 0 < losses[-2]
        errors = [o.error for o in linear.options]
        assert errors == sorted(errors, reverse=True) and errors[0] < 0.5


def test_errors_are_on_held_out_inputs_of_the_dense_model(
    case: Case, chosen: tuple[BudgetPlan, Path]
) -> None:
    model, inputs = dense_model(case.path), []
    for linear in chosen[0].linears:
        module = model.get_submodule(linear.name)
        hook = module.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
        with torch.no_grad():
            model(input_ids=case.windows.check)
        hook.remove()
        seen, weight = inputs.pop().flatten(0, 1), module.weight.data
        lost = seen @ (Int8.from_dense(weight).unpack() - weight).T
        expected = float(lost.square().sum() / (seen @ weight.T).square().sum())
        assert linear.options[2].error == pytest.approx(expected, rel=1e-3)


def test_what_is_tried_is_what_a_recipe_can_choose() -> None:
    assert set(candidates.FORMATS_TRIED) <= CHOICES.keys()


def test_odd_shapes_get_the_formats_that_they_can_take(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", Tiny(hidden=16, intermediate=30, heads=2, layers=1))
    source = Source.open(model)
    wide = possible_formats(source, asked(), "model.layers.0.mlp.down_proj")
    assert wide == ["int4", "int8", "dense"]
    assert len(possible_formats(source, asked(), "model.layers.0.mlp.up_proj")) == 4


# --- what is chosen ----------------------------------------------------------------------------


def test_a_ratio_is_met_by_the_finished_model(
    case: Case, chosen: tuple[BudgetPlan, Path], tmp_path: Path
) -> None:
    plan, wanted = chosen[0], asked(max_ppl_ratio=RATIO)
    assert len(Counter(plan.choices.values())) > 1 and plan.share_of_bytes < 0.6
    assert 1.0 < plan.measured.value <= RATIO
    assert len(plan.measurements) <= 7
    # The search leaves room for what other text may say.
    margin = math.sqrt(2) * plan.measured.error
    assert margin > 0
    assert math.log(plan.measured.value) + margin <= math.log(RATIO)
    prune(case.path, tmp_path / "out", replace(wanted, choices=plan.choices))
    checked = check_budget(tmp_path / "out", case.source, wanted, case.windows.judge)
    assert checked.met and checked.ratio <= RATIO
    model = load_model(tmp_path / "out", "float32")
    packed = {name: entry.format for name, entry in model.checkpoint.linears.items()}
    assert packed == {n: kind for n, kind in plan.choices.items() if kind != Dense.kind}
    served = served_losses(model, case.windows.judge)
    ratio = Ratio.of(served, list(plan.dense_losses), case.windows.judge.shape[1])
    assert checked.ratio == pytest.approx(ratio.value, rel=1e-4)
    strict = check_budget(
        tmp_path / "out", case.source, asked(max_ppl_ratio=1.0001), case.windows.judge
    )
    assert not strict.met


def test_the_search_learns_nothing_of_the_windows_that_judge(
    case: Case, chosen: tuple[BudgetPlan, Path], tmp_path: Path
) -> None:
    other = replace(case.windows, judge=case.windows.judge.flip(1))
    plan = choose_formats(case.source, asked(max_ppl_ratio=RATIO), other, tmp_path / "scratch")
    assert plan.choices == chosen[0].choices
    assert plan.measurements == chosen[0].measurements
    dense = window_losses(case.source, other.judge, case.source.block_tensors)
    assert list(plan.dense_losses) == dense != list(chosen[0].dense_losses)


def test_the_saved_recipe_of_a_budget_gives_its_weights_again(case: Case, tmp_path: Path) -> None:
    first = prune(case.path, tmp_path / "first", asked(max_ppl_ratio=1.05))
    again = Recipe.read(tmp_path / "first" / "halfweave.json")
    assert again.choices and not again.has_budget and again.is_for_budget
    assert first.budget == check_budget(first.path, case.source, again, case.windows.judge)
    second = prune(case.path, tmp_path / "again", again)
    assert second.plan == replace(first.plan, seconds=second.plan.seconds)
    shards = list((tmp_path / "first").glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()
    assert not list((tmp_path / "again").glob(".*"))


def test_the_disk_that_a_search_needs_is_told_before(
    case: Case, chosen: tuple[BudgetPlan, Path]
) -> None:
    shards = [read_shard(file) for file in chosen[1].glob("block-*.safetensors")]
    written = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    told = make_plan(case.source, asked(max_ppl_ratio=RATIO)).scratch_bytes
    assert written <= told < 1.3 * written  # headers, which are not nothing for so small a model


def test_no_disk_is_told_for_formats_that_a_linear_cannot_take(tmp_path: Path) -> None:
    sizes = {}
    for wide in (32, 30):  # where down_proj can, and cannot, take 2:4
        tiny = Tiny(hidden=16, intermediate=wide, heads=2, layers=1)
        source = Source.open(save_tiny(tmp_path / str(wide), tiny))
        sizes[wide] = make_plan(source, asked(target_bytes=0.9)).scratch_bytes
    whole = stored_bytes(source, "model.layers.0.mlp.down_proj", "int4", 32)
    assert sizes[32] - sizes[30] > whole / 2


@pytest.mark.parametrize("share", [0.4, 0.45, 0.6, 0.9])
def test_a_share_of_bytes_is_met_exactly(
    case: Case, chosen: tuple[BudgetPlan, Path], tmp_path: Path, share: float
) -> None:
    wanted = asked(target_bytes=share)
    plan = choose_formats(case.source, wanted, case.windows, chosen[1])
    prune(case.path, tmp_path / "out", replace(wanted, choices=plan.choices))
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written <= plan.bytes_after <= share * plan.bytes_before
    assert written > plan.bytes_after - 1000
    assert plan.share_of_bytes > share - 0.06  # a step of a linear of so small a model
    checked = check_budget(tmp_path / "out", case.source, wanted, case.windows.judge)
    assert checked.met and checked.share_of_bytes == written / bytes_before(case.source)
    if set(plan.choices.values()) <= {"int8", "dense"}:  # which calibration cannot change
        seen = check_budget(tmp_path / "out", case.source, wanted, case.windows.search)
        assert seen.ratio == pytest.approx(plan.measured.value, rel=1e-6)


def test_a_tighter_budget_never_gets_a_worse_prediction(
    case: Case, chosen: tuple[BudgetPlan, Path]
) -> None:
    plans = [
        choose_formats(case.source, asked(target_bytes=share), case.windows, chosen[1])
        for share in (0.4, 0.5, 0.7)
    ]
    predicted = [plan.predicted_ratio for plan in plans]
    assert predicted == sorted(predicted, reverse=True)


def test_bytes_out_of_reach_are_refused_before_any_work(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"0\.1 cannot be reached: embeddings") as caught:
        choose_formats(case.source, asked(target_bytes=0.1), case.windows, tmp_path / "scratch")
    least = float(str(caught.value.hint).split()[1])
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(UsageError, match="cannot be reached"):
        plan_prune(case.path, asked(target_bytes=0.1))
    smallest = bytes_that_stay(case.source) + sum(
        stored_bytes(case.source, name, "sparse24_int4", 32)
        for index in range(2)
        for name in case.source.linear_names(index)
    )
    assert (
        smallest / bytes_before(case.source) <= least < smallest / bytes_before(case.source) + 2e-3
    )


def test_a_recipe_without_a_budget_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither max_ppl_ratio nor target_bytes"):
        choose_formats(case.source, asked(), case.windows, tmp_path)


def test_what_is_not_finite_stops_the_choice_or_stays_dense(
    case: Case, copy_of: Copy, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.k_proj"
    model = copy_of(case.path)
    set_weight(model, f"{name}.weight", lambda w: w[3].fill_(float("nan")))
    source, wanted = Source.open(model), asked(target_bytes=0.5)
    with pytest.raises(CheckpointError, match=rf"{name}.weight is not finite at \[3, 0\]"):
        choose_formats(source, wanted, case.windows, tmp_path / "a")
    allowed = replace(wanted, allow_nonfinite=True)
    plan = choose_formats(source, allowed, case.windows, tmp_path / "b")
    assert plan.choices[name] == "dense" and plan.bytes_after <= 0.5 * plan.bytes_before


# --- going on ----------------------------------------------------------------------------------


def killing(step: str, done: int) -> Told:
    """Dies, as by `kill -9`, when told so."""

    def told(progress: BudgetProgress) -> None:
        if (progress.step, progress.done) == (step, done):
            os.kill(os.getpid(), signal.SIGKILL)

    return told


@pytest.mark.parametrize(
    ("step", "done"),
    [("sensitivities", 1), ("candidates", 1), ("measurements", 2)],
)
def test_a_killed_choice_goes_on_to_the_same_plan(
    case: Case, chosen: tuple[BudgetPlan, Path], tmp_path: Path, step: str, done: int
) -> None:
    wanted, scratch = asked(max_ppl_ratio=RATIO), tmp_path / "scratch"

    def killed() -> None:
        choose_formats(case.source, wanted, case.windows, scratch, killing(step, done))

    assert in_child(killed) == signal.SIGKILL
    (scratch / ".block-00001.safetensors.x1y2.tmp").write_bytes(b"half")
    assert choose_formats(case.source, wanted, case.windows, scratch) == chosen[0]
    assert not list(scratch.glob(".*.tmp"))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts, in place, how often the solver is called."""
    calls: list[int] = []
    real: Method = candidates.METHODS["admm"]

    def count(weight: Tensor, *rest: object) -> object:
        calls.append(1)
        return real(weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(candidates, "METHODS", {"admm": count})
    return calls


def test_finished_blocks_are_not_solved_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, calls = asked(target_bytes=0.4), counting(monkeypatch)

    def stop(progress: BudgetProgress) -> None:
        if (progress.step, progress.done) == ("candidates", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose_formats(case.source, wanted, case.windows, tmp_path, stop)
    assert len(calls) == 14
    choose_formats(case.source, wanted, case.windows, tmp_path)
    assert len(calls) == 28
    choose_formats(case.source, asked(target_bytes=0.6), case.windows, tmp_path)
    assert len(calls) == 28


def test_another_recipe_model_or_text_does_not_go_on(
    case: Case, chosen: tuple[BudgetPlan, Path], tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=r"cannot go on in .*: recipe changed"):
        choose_formats(case.source, asked(max_ppl_ratio=1.2, group=64), case.windows, chosen[1])
    other = replace(case.windows, fit=case.windows.fit[1:])
    with pytest.raises(RefusedError, match="windows changed"):
        choose_formats(case.source, asked(max_ppl_ratio=1.2), other, chosen[1])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RefusedError, match="holds other files"):
        choose_formats(case.source, asked(max_ppl_ratio=1.2), case.windows, tmp_path)
