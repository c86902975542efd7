"""The parts of recovery against plain oracles: the fused loss, latents of every format, and
windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from halfweave.errors import CapacityError, HalfweaveError, UsageError
from halfweave.kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from halfweave.pruner.recover import fused_kl as module
from halfweave.pruner.recover.fused_kl import fused_kl
from halfweave.pruner.recover.latents import Latent
from halfweave.pruner.recover.memory import check_memory
from halfweave.pruner.recover.settings import Distillation
from halfweave.pruner.recover.trainer import schedule
from halfweave.pruner.recover.windows import Windows, next_tokens
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


def test_the_greatest_seed_has_an_order_too() -> None:
    windows = Windows(torch.arange(8)[:, None], torch.empty(0, 1))
    assert sorted(windows.of_step(2**20, 8, 2**32 - 1)) == list(range(8))


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
        {"seed": -1},
        {"seed": 2**32},
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
