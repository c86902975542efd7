"""Perplexity and divergence are exactly what an independent computation makes of the same text."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from halfweave.errors import HalfweaveError, RefusedError, UsageError
from halfweave.runtime.decoder import Decoder
from halfweave.runtime.eval import evaluate, read_text
from halfweave.runtime.model import Model, load_model
from support.tiny import Tiny, dense_model, pack_directory, save_tiny, save_tokenizer

TEXT = "Two foxes keep every fourth weight; nobody minds the lazy zero. " * 60
WINDOW = 160  # more than one chunk of rows


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("eval") / "dense")


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_model(directory, "float32")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("eval") / "other", Tiny(seed=1))


def oracle_logits(directory: Path, windows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return dense_model(directory)(windows).logits[:, :-1].double()


def windows_of(model: Model) -> torch.Tensor:
    ids = torch.tensor(model.tokenizer.encode(TEXT, special=False))
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def test_perplexity_is_the_one_transformers_gives(directory: Path, model: Model) -> None:
    windows = windows_of(model)
    logits = oracle_logits(directory, windows)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    result = evaluate(model, TEXT, window=WINDOW)
    assert result.ppl == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert result.tokens == windows[:, 1:].numel()
    assert (result.kl, result.agreement, result.against_ppl) == (None, None, None)


def test_divergence_is_from_the_dense_model_to_the_other(
    directory: Path, other: Path, model: Model
) -> None:
    windows = windows_of(model)
    truth = oracle_logits(directory, windows).log_softmax(-1)
    guess = oracle_logits(other, windows).log_softmax(-1)
    result = evaluate(load_model(other), TEXT, window=WINDOW, against=model)
    kl = (truth.exp() * (truth - guess)).sum(-1).mean().item()
    assert result.kl == pytest.approx(kl, rel=1e-4)
    agreed = (truth.argmax(-1) == guess.argmax(-1)).double().mean().item()
    assert result.agreement == pytest.approx(agreed, abs=2 / result.tokens)
    assert result.against_ppl == pytest.approx(evaluate(model, TEXT, window=WINDOW).ppl)


def test_a_model_agrees_with_itself(model: Model) -> None:
    result = evaluate(model, TEXT, window=WINDOW, against=model)
    assert (result.kl, result.agreement) == (0.0, 1.0)
    assert result.ppl == result.against_ppl


def test_a_packed_model_is_measured_like_its_unpacked_twin(tmp_path: Path, directory: Path) -> None:
    packed = pack_directory(directory, tmp_path / "packed", "sparse24_int4")
    twin = load_model(tmp_path / "packed-dense")
    result = evaluate(load_model(packed, "float32"), TEXT, window=WINDOW, against=twin)
    assert result.kl == pytest.approx(0.0, abs=1e-6)
    assert result.agreement == 1.0


def test_the_fastest_kernels_measure_nearly_the_same(tmp_path: Path, directory: Path) -> None:
    packed = pack_directory(directory, tmp_path / "packed", "sparse24_int4")
    exact = load_model(packed, "float32")
    result = evaluate(load_model(packed), TEXT, window=WINDOW, against=exact)
    assert result.kl is not None and result.against_ppl is not None
    assert 0 < result.kl < 0.005
    assert result.ppl == pytest.approx(result.against_ppl, rel=0.02)


def test_the_last_partial_window_is_dropped(model: Model) -> None:
    ids = model.tokenizer.encode(TEXT, special=False)
    whole = len(ids) // 100
    assert len(ids) % 100 != 0
    result = evaluate(model, TEXT, window=100)
    assert (result.windows, result.tokens) == (whole, whole * 99)


def test_fewer_windows_are_every_kth_one(directory: Path, model: Model) -> None:
    windows = windows_of(model)[::4]
    logits = oracle_logits(directory, windows)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    limit = math.ceil(len(windows_of(model)) / 4)
    result = evaluate(model, TEXT, window=WINDOW, max_windows=limit)
    assert result.windows == len(windows) <= limit
    assert result.ppl == pytest.approx(math.exp(loss.item()), rel=1e-4)


def test_logits_are_held_for_a_bounded_number_of_positions(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = Decoder.logits

    def watched(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        held.append(len(hidden))
        return real(self, hidden)

    monkeypatch.setattr(Decoder, "logits", watched)
    evaluate(model, TEXT, window=256, max_windows=1)
    assert held == [128, 127]


def test_progress_counts_every_window(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(model, TEXT, window=100, progress=lambda d, t, _: seen.append((d, t)))
    assert seen == [(n + 1, result.windows) for n in range(result.windows)]


def test_the_text_is_known_by_its_hash(model: Model) -> None:
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    assert evaluate(model, TEXT, window=100, max_windows=1).text_sha256 == digest


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers(model: Model) -> None:
    count = len(model.tokenizer.encode("Too short.", special=False))
    with pytest.raises(UsageError, match=rf"{count} tokens, one window needs 64"):
        evaluate(model, "Too short.", window=64)


@pytest.mark.parametrize(("window", "message"), [(1, "predicts nothing"), (257, "reads 256")])
def test_a_window_must_fit_the_model(model: Model, window: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(model, TEXT, window=window)


def test_models_with_different_tokenizers_are_not_compared(tmp_path: Path, model: Model) -> None:
    stranger = save_tiny(tmp_path / "stranger", Tiny(vocabulary=328))
    with pytest.raises(RefusedError, match="do not share a tokenizer"):
        evaluate(load_model(stranger), TEXT, window=WINDOW, against=model)


def test_scores_that_are_not_finite_are_an_error_not_a_figure(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "huge", Tiny(tied=False))
    model = dense_model(directory)
    model.lm_head.weight.data.fill_(3e38)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    with pytest.raises(HalfweaveError, match="huge: scores of window 0 are not finite"):
        evaluate(load_model(directory), TEXT, window=WINDOW)
    plain = load_model(save_tiny(tmp_path / "plain", Tiny(tied=False)))
    with pytest.raises(HalfweaveError, match="huge: scores of window 0 are not finite"):
        evaluate(plain, TEXT, window=WINDOW, against=load_model(directory))


@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "cannot be read"), (b"\xff\xfe", "not UTF-8 .byte 0"), (b"a\0b", "binary")],
)
def test_a_text_file_must_be_text(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_text(path)
