"""The parts of recovery against plain oracles: the fused loss, latents of every format, windows;
and the trainings of what ends in codes, and what is told of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from halfweave.cli import tables
from halfweave.errors import CapacityError, HalfweaveError, UsageError
from halfweave.files import read_json
from halfweave.kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from halfweave.pruner.calibrate import load_text
from halfweave.pruner.oneshot import OneShot, Progress, draw_sample
from halfweave.pruner.pipeline import prune
from halfweave.pruner.plan import make_plan
from halfweave.pruner.recover import fused_kl as module
from halfweave.pruner.recover.distill import Link, distill, make_trainer
from halfweave.pruner.recover.fused_kl import fused_kl
from halfweave.pruner.recover.latents import Latent
from halfweave.pruner.recover.memory import check_memory
from halfweave.pruner.recover.settings import Distillation, DistillProgress, DistillResult
from halfweave.pruner.recover.state import load_moments
from halfweave.pruner.recover.trainer import schedule
from halfweave.pruner.recover.windows import Windows, next_tokens
from halfweave.pruner.recovery import Recovery, recover
from halfweave.pruner.source import Source, Trained, token_ids
from halfweave.pruner.staged import Split
from halfweave.runtime.checkpoint import Checkpoint
from support.pruning import TEXT, recipe
from torch import Tensor

KINDS = ("dense", "dense with zeros", "sparse24", "sparse24_int4", "int4", "int8")


def plain_loss(
    student: Tensor, dense: Tensor, heads: tuple[Tensor, Tensor], targets: Tensor, ce: float
) -> Tensor:
    """The same loss written out, for autograd."""
    scores = (student @ heads[0].T).log_softmax(-1)
    truth = (dense @ heads[1].T).log_softmax(-1)
    kl = (truth.exp() * (truth - scores)).sum()
    known = targets >= 0
    nll = -scores[known].gather(1, targets[known][:, None]).sum()
    return kl + ce * nll


@pytest.mark.parametrize("ce", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_fused_loss_and_its_gradient_are_those_of_autograd(
    ce: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    student, dense, *heads = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 12), (7, 12), (50, 12), (50, 12))
    )
    targets = torch.tensor([3, 49, -1, 0, 7, 7, -1])
    pair = (heads[0], heads[1])
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", rows * 50)
    student.requires_grad_(True)
    expected = plain_loss(student, dense, pair, targets, ce)
    (wanted,) = torch.autograd.grad(2.5 * expected, student)
    loss, nll = fused_kl(student, dense, pair, targets, ce)
    (gradient,) = torch.autograd.grad(2.5 * loss, student)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    only_nll = plain_loss(student, dense, pair, targets, 1.0) - plain_loss(
        student, dense, pair, targets, 0.0
    )
    torch.testing.assert_close(nll, only_nll, rtol=1e-12, atol=1e-12)


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    hidden, head = torch.randn(5, 8), torch.randn(30, 8)
    student = hidden.clone().requires_grad_(True)
    loss, _ = fused_kl(student, hidden, (head, head), torch.full((5,), -1))
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


def some_linear(kind: str) -> PackedLinear:
    """A linear [6, 72] of each format, with a kept zero and groups that end short."""
    weight = torch.randn(6, 72, generator=torch.Generator().manual_seed(1))
    keep = torch.zeros(6, 18, 4, dtype=torch.bool)
    keep[..., 1] = keep[..., 3] = True
    keep = keep.view(6, 72)
    codes = torch.randint(-8, 8, (6, 72), generator=torch.Generator().manual_seed(2)).float()
    codes[0, 1] = 0
    scale = torch.rand(6, 3, generator=torch.Generator().manual_seed(3)).add(0.1).half()
    if kind == "dense":
        return Dense(weight)
    if kind == "dense with zeros":
        return Dense((weight * keep).bfloat16())
    if kind == "sparse24":
        return Sparse24.from_dense((weight * keep).bfloat16())
    if kind == "sparse24_int4":
        return Sparse24Int4.from_codes(codes, keep, scale, 32)
    return Int4.from_codes(codes, scale, 32) if kind == "int4" else Int8.from_dense(weight)


def weight_of(latent: Latent) -> Tensor:
    out = torch.full(latent.stored.shape, float("nan"))
    latent.write_weight(out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_before_any_step_a_latent_is_exactly_what_is_stored(kind: str) -> None:
    stored = some_linear(kind)
    latent = Latent.of(stored)
    assert torch.equal(weight_of(latent), stored.unpack())
    packed = latent.packed("p")
    assert type(packed) is type(stored)
    for name, tensor in stored.tensors().items():
        assert torch.equal(packed.tensors()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_after_training_is_what_was_trained_with_the_masks_kept(kind: str) -> None:
    stored = some_linear(kind)
    latent = Latent.of(stored)
    before = latent.value.clone()
    latent.take_gradient(torch.randn(stored.shape), weight_of(latent))
    with torch.no_grad():
        assert latent.value.grad is not None
        latent.value.sub_(2.0 * latent.value.grad)
        if latent.grid is not None:
            assert latent.grid.log_factor.grad is not None
            latent.grid.log_factor.sub_(0.01 * latent.grid.log_factor.grad)
    assert not torch.equal(latent.value, before)
    packed = latent.packed("p")
    packed.validate("p")
    half = {"sparse24", "dense with zeros"}  # stored as bf16, trained in fp32
    tolerance = 2**-8 if kind in half else 0.0
    torch.testing.assert_close(packed.unpack(), weight_of(latent), rtol=tolerance, atol=0)
    if latent.keep is not None:
        assert not packed.unpack()[~latent.keep].any()
    if isinstance(stored, Sparse24 | Sparse24Int4):
        assert torch.equal(packed.tensors()["meta"], stored.meta)


def test_latents_do_not_share_memory_with_the_checkpoint() -> None:
    stored = some_linear("dense")
    assert isinstance(stored, Dense)
    before = stored.weight.clone()
    Latent.of(stored).value.zero_()
    assert torch.equal(stored.weight, before)


@pytest.mark.parametrize("kind", ["sparse24_int4", "int4", "int8"])
def test_grid_gradients_are_those_of_rounding_straight_through(kind: str) -> None:
    """Autograd through s * (u + (round(u) - u).detach()), s = start * exp(log_factor)."""
    latent = Latent.of(some_linear(kind))
    grid = latent.grid
    assert grid is not None
    keep = torch.ones_like(latent.value) if latent.keep is None else latent.keep
    with torch.no_grad():
        latent.value.add_(0.4 * torch.randn_like(latent.value) * keep)
    weight, upstream = weight_of(latent), torch.randn(latent.stored.shape)
    value = latent.value.clone().requires_grad_(True)
    factor = torch.zeros_like(grid.start).requires_grad_(True)
    scale = (grid.start * factor.exp()).repeat_interleave(grid.group, 1)[:, : value.shape[1]]
    plain = scale * keep * (value + (value.round() - value).detach())
    torch.testing.assert_close(weight, plain.detach())
    (plain * upstream).sum().backward()
    latent.take_gradient(upstream.clone(), weight)
    torch.testing.assert_close(latent.value.grad, value.grad)
    torch.testing.assert_close(grid.log_factor.grad, factor.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sparse24_int4", "int4", "int8"])
def test_latents_lie_on_the_side_of_what_their_codes_were_rounded_from(kind: str) -> None:
    stored = some_linear(kind)
    alone = Latent.of(stored)
    assert alone.grid is not None
    grid = alone.grid
    scale = grid.start.repeat_interleave(grid.group, 1)[:, : stored.shape[1]]
    near = stored.unpack() + scale * 1.5 * torch.randn(stored.shape)
    latent = Latent.of(stored, near)
    assert torch.equal(weight_of(latent), stored.unpack())
    keep = torch.ones_like(latent.value) if alone.keep is None else alone.keep
    wanted = keep * (near / scale - alone.value).clamp(-0.49, 0.49)
    torch.testing.assert_close(latent.value - alone.value, wanted, atol=1e-4, rtol=0)


def test_a_latent_is_kept_where_it_still_rounds_to_the_last_code() -> None:
    latent = Latent.of(some_linear("int4"))
    latent.value[0, :2] = torch.tensor([1e6, -1e6])
    weight = weight_of(latent)
    scale = latent.stored.tensors()["scale"][0, 0].float()
    assert weight[0, :2].tolist() == [float(7 * scale), float(-8 * scale)]
    latent.value[0, :2] += torch.tensor([-0.999, 0.999])
    assert weight_of(latent)[0, :2].tolist() == [float(6 * scale), float(-7 * scale)]


def test_a_weight_that_overflows_is_an_error_with_the_way_on() -> None:
    for kind in ("dense", "sparse24_int4"):
        latent = Latent.of(some_linear(kind))
        latent.value[0, 1] = float("nan")
        with pytest.raises(HalfweaveError, match=r"model\.q: .*not finite") as caught:
            latent.packed("model.q")
        assert "learning rate" in str(caught.value.hint)


def test_held_out_windows_share_no_token_with_training() -> None:
    windows = Windows.cut(range(1000), 10, 7)
    assert windows.held_out.shape == (7, 10)
    assert windows.train.shape == (93, 10)
    both = torch.cat([windows.train, windows.held_out]).flatten().sort().values
    assert torch.equal(both, torch.arange(1000))


def test_the_order_is_a_function_of_step_and_seed_and_uses_every_window_first() -> None:
    windows = Windows.cut(range(230), 10, 2)
    order = [i for step in range(6) for i in windows.of_step(step, 7, seed=3)]
    assert sorted(order[:21]) == sorted(order[21:42]) == list(range(21))
    assert order[:21] != order[21:42]
    assert windows.of_step(2, 7, seed=3) == order[14:21]
    assert windows.of_step(2, 7, seed=4) != order[14:21]


def test_every_position_but_the_last_has_a_next_token() -> None:
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, -1]]


def test_a_short_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match=r"99 tokens.*need 100"):
        Windows.cut(range(99), 10, 9)
    assert len(Windows.cut(range(100), 10, 9).train) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"length": 1},
        {"batch_tokens": 700},
        {"minutes": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": 0.0},
        {"tokens": 10},
        {"held_out": 0},
        {"warmup_steps": 1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Distillation(**settings)  # type: ignore[arg-type]


def test_rates_rise_then_fall_and_the_rise_does_not_depend_on_the_end() -> None:
    settings = Distillation(warmup_steps=5, final_rate=0.1)
    rates = [schedule(i, 40, settings) for i in range(41)]
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[:5] == [schedule(i, 0, settings) for i in range(5)]


def test_too_little_memory_is_told_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfweave.pruner.recover.memory.available_memory_bytes", lambda _: 2**30)
    check_memory(2**30, torch.device("cpu"))
    with pytest.raises(CapacityError, match=r"about 3\.0 GiB.*1\.0 GiB are available"):
        check_memory(3 * 2**30, torch.device("cpu"))


def test_a_full_disk_is_told_apart_from_other_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors
    from halfweave.pruner.tensors import save_tensors

    def fail(message: str) -> None:
        def save(*args: object, **kwargs: object) -> None:
            raise safetensors.SafetensorError(message)

        monkeypatch.setattr("safetensors.torch.save_file", save)

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    # The library's own words on a file system that is full.
    fail("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(CapacityError, match="disk is full"):
        save_tensors(path, {"a": torch.zeros(2)}, {})
    fail("Error while serializing: something else")
    with pytest.raises(safetensors.SafetensorError):
        save_tensors(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# ---- trained as floats, and again behind each part of the blocks that was rounded

# The tiny model has two blocks, so two parts.
PARTS = Recovery(calib=str(TEXT), tokens=4096, bits=4, group=32, precision="float32")
ERRORS = ("relative_error", "held_out_error", "baseline_error")


@pytest.fixture(scope="module")
def floats(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, 2:4 with 16 bits."""
    directory = tmp_path_factory.mktemp("floats") / "floats"
    prune(tiny_model, directory, recipe())
    return directory


@pytest.mark.parametrize(("rate", "undone"), [(0.1, 0), (1e4, 2)])
def test_what_ends_in_codes_tells_of_all_trainings_and_roundings(
    rate: float,
    undone: int,
    tiny_model: Path,
    floats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("halfweave.pruner.staged._CODES_RATE", rate)
    told: list[Progress | DistillProgress] = []
    result = recover(floats, tiny_model, tmp_path / "out", PARTS, progress=told.append)
    manifest = read_json(tmp_path / "out" / "halfweave.json")
    record = manifest["provenance"]["recovery"]
    between = record["before_rounding"]
    first = between["before_rounding"]
    assert [each["steps"] for each in (first, between, record)] == [2, 1, 1]
    assert (result.tokens, result.steps, result.trainings) == (4096, 4, 3)
    assert result.before == first["held_out_kl"]["before"]
    assert result.after == record["held_out_kl"]["after"]
    ends = [each["held_out_kl"] for each in (first, between, record)]
    assert [each.before for each in result.roundings] == [end["after"] for end in ends[:2]]
    assert [each.after for each in result.roundings] == [end["before"] for end in ends[1:]]
    assert result.undone == undone and not result.rolled_back
    assert result.curve[-1].tokens == 4096
    training = [note for note in told if isinstance(note, DistillProgress)]
    assert result.minutes is not None
    assert result.minutes >= sum(training[at].minutes for at in (1, 2, 3))
    for entry in manifest["linears"].values():
        assert [entry[name] for name in ERRORS] == [None] * 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "calibration tokens, median | not measured |" in card
    assert "Trained on 4096 tokens" in card
    assert f"held-out text: {result.before:.4f} -> {result.after:.4f} nats" in card
    for rounding in result.roundings:
        assert f"from {rounding.before:.4f} to {rounding.after:.4f}" in card
    assert (f"Of 3 trainings {undone} did not help" in card) == bool(undone)
    assert "as they were" not in card and "those from before" not in card


def test_a_part_is_rounded_while_the_others_stay_as_they_are(
    tiny_model: Path, floats: Path, tmp_path: Path
) -> None:
    source = Trained.of(Source.open(tiny_model), Checkpoint.open(floats))
    codes = recipe(bits=4, group=32)
    plan = make_plan(source, codes)
    sample = draw_sample(source, load_text(str(TEXT)), codes)
    OneShot(source, tmp_path, codes, plan, sample, None, range(1, 2)).ensure()
    before, after = Checkpoint.open(floats), Checkpoint.open(tmp_path)
    for name in after.linears:
        is_rounded = ".layers.1." in name
        assert after.linears[name].format == ("sparse24_int4" if is_rounded else "sparse24")
        if not is_rounded:
            pairs = before.linear(name).tensors(), after.linear(name).tensors()
            assert all(torch.equal(pairs[0][suffix], pairs[1][suffix]) for suffix in pairs[0])


def test_the_rounding_may_move_masks(tiny_model: Path, floats: Path, tmp_path: Path) -> None:
    recover(floats, tiny_model, tmp_path / "out", PARTS)
    before, after = Checkpoint.open(floats), Checkpoint.open(tmp_path / "out")
    metas = [(before.linear(n).tensors(), after.linear(n).tensors()) for n in after.linears]
    assert not all(torch.equal(old["meta"], new["meta"]) for old, new in metas)


@pytest.mark.parametrize("steps", [2, 4])  # as floats, or of all trainings
def test_a_stopped_run_goes_on_to_the_same_end_and_makes_up_no_time(
    tiny_model: Path, floats: Path, tmp_path: Path, steps: int
) -> None:
    told: list[DistillProgress] = []

    def stop(step: Progress | DistillProgress) -> None:
        if isinstance(step, DistillProgress):
            told.append(step)
        if len(told) == steps and (steps == 4 or isinstance(step, Progress)):
            raise KeyboardInterrupt

    whole = recover(floats, tiny_model, tmp_path / "whole", PARTS)
    with pytest.raises(KeyboardInterrupt):
        recover(floats, tiny_model, tmp_path / "out", PARTS, progress=stop)
    result = recover(floats, tiny_model, tmp_path / "out", PARTS, resume=True)
    assert result.minutes is None
    assert timeless(result) == timeless(whole)
    record = read_json(tmp_path / "out" / "halfweave.json")["provenance"]["recovery"]
    assert timeless(DistillResult.of_record(result.path, record)) == timeless(whole)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_a_training_goes_on_with_the_moments_and_windows_of_the_one_before(
    tiny_model: Path, floats: Path, tmp_path: Path
) -> None:
    source, words = Source.open(tiny_model), TEXT.read_text()

    def losses(student: Path, out: str, steps: int, link: Link) -> list[float]:
        (tmp_path / out).mkdir()
        chosen = Distillation(tokens=1024 * steps, held_out=2, precision="float32")
        told: list[DistillProgress] = []
        distill(student, source, tmp_path / out, words, chosen, link=link, progress=told.append)
        return [step.loss for step in told]

    whole = losses(floats, "whole", 3, Link())
    first = losses(floats, "first", 2, Link(goes_on=True))
    then = losses(tmp_path / "first", "then", 1, Link(tmp_path / "first"))
    assert first == whole[:2]
    assert then == pytest.approx(whole[2:], rel=1e-3)  # bf16 weights lie in between

    known = load_moments(tmp_path / "first")
    assert known is not None and known[1] == 2 and load_moments(tmp_path / "then") is None
    chosen = Distillation(tokens=1024, held_out=2, precision="float32")
    windows = Windows.cut(token_ids(source, words), chosen.length, chosen.held_out)
    opened = Checkpoint.open(tmp_path / "first"), None
    trainer, _ = make_trainer(source, opened, windows, chosen, 0)
    trainer.adopt(*known)
    found = trainer.moments()
    assert found.keys() == known[0].keys() and trainer.taken == 2
    assert all(torch.equal(found[name], moment) for name, moment in known[0].items())
    assert any(moment.any() for moment in found.values())


def timeless(result: DistillResult) -> DistillResult:
    curve = tuple(replace(point, minutes=None) for point in result.curve)
    return replace(result, path=Path(), minutes=None, curve=curve)


def test_one_step_cannot_be_parted(tiny_model: Path, floats: Path, tmp_path: Path) -> None:
    chosen = replace(PARTS, tokens=2047)
    with pytest.raises(UsageError, match="2047 tokens are one step of 1024") as caught:
        recover(floats, tiny_model, tmp_path / "out", chosen)
    assert "2048" in str(caught.value.hint)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_trainings_take_the_tokens_that_were_asked_for_and_no_more(parts: int) -> None:
    for steps in range(parts + 1, 80):
        shared = Split(Distillation(tokens=1024 * steps + 1023), parts)
        each = [shared.settings(number).tokens for number in range(parts + 1)]
        assert sum(each) == 1024 * steps
        assert min(each) >= 1024
        behind = 0.12 * (parts - 1) + 0.06
        assert abs(each[0] / sum(each) - (1 - behind)) <= parts / steps


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_tokens_of_a_timed_run_are_shared_out_as_the_clock_did(parts: int) -> None:
    timed = Split(Distillation(minutes=20.0), parts)
    assert timed.settings(0).minutes == pytest.approx(20 * (1 - 0.12 * (parts - 1) - 0.06))
    for steps in range(1, 80):
        later = [timed.settings(n, 1024 * steps).tokens for n in range(1, parts + 1)]
        again = Split(Distillation(tokens=1024 * steps + sum(later)), parts)
        assert [again.settings(n).tokens for n in range(parts + 1)] == [1024 * steps, *later]


def test_rates_fall_from_one_training_to_the_next() -> None:
    shared = Split(Distillation(tokens=1024 * 100, learning_rate=2.0, final_rate=0.1), 3)
    each = [shared.settings(number) for number in range(4)]
    begin = [one.learning_rate for one in each]
    end = [one.learning_rate * one.final_rate for one in each]
    assert begin == pytest.approx([2.0, 0.8, 0.6, 0.4])
    assert end == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [one.code_share for one in each] == [1.0, 0.1, 0.1, 0.1]


def training(before: float, after: float, minutes: float | None) -> DistillResult:
    """One training of 2048 tokens, rolled back if it did not help."""
    return DistillResult(
        Path("out"), 2048, 2, before, min(before, after), int(after >= before), (), minutes
    )


def test_the_line_of_a_recovery_tells_all_of_it() -> None:
    plain = tables.recovery(training(0.8, 0.5, 1.5))
    kl = "KL from the dense model on held-out text"
    assert plain == f"out is complete: 2048 tokens in 1.5 min, {kl} 0.800 -> 0.500"
    undone = tables.recovery(training(0.8, 0.9, 1.5))
    assert undone.endswith("1.5 min, it did not help, the weights are those from before it")
    both = training(0.6, 0.7, 0.5).behind(training(0.8, 0.5, 1.5))
    assert tables.recovery(both).splitlines() == [
        f"out is complete: 4096 tokens in 2.0 min, {kl} 0.800 -> 0.600",
        "  rounding blocks to codes took it from 0.500 to 0.600",
        "  1 of 2 trainings did not help: undone",
    ]


def test_the_line_of_a_recovery_in_which_nothing_helped() -> None:
    result = training(0.9, 0.9, 0.5).behind(training(0.8, 0.8, None))
    assert result.rolled_back
    first, *others = tables.recovery(result).splitlines()
    assert "4096 tokens in an unknown time, " in first and first.endswith(" 0.800 -> 0.900")
    assert others == [
        "  rounding blocks to codes took it from 0.800 to 0.900",
        "  2 of 2 trainings did not help: undone",
    ]
