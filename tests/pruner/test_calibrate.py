"""Calibration text and windows. Row 8: bad text is a usage error that names what is needed."""

import hashlib
from pathlib import Path

import pytest
import torch
from halfweave.errors import UsageError
from halfweave.pruner.calibrate import load_text, sample_windows


def test_the_builtin_text_is_clean_varied_prose() -> None:
    text = load_text("builtin")
    assert text.origin == "the built-in text"
    assert 250_000 < len(text.text) < 400_000
    assert "http-equiv" not in text.text
    assert "\r" not in text.text
    assert "Gutenberg" not in text.text
    assert all(line == line.strip() for line in text.text.split("\n"))


@pytest.mark.parametrize("name", ["builtin", "builtin-eval"])
def test_a_builtin_text_is_the_one_its_readme_describes(name: str) -> None:
    readme = Path(load_text.__code__.co_filename).parent / "data" / "README.md"
    assert load_text(name).sha256 in readme.read_text(encoding="utf-8")


def test_the_evaluation_text_shares_no_passage_with_the_calibration_text() -> None:
    calibration, evaluation = (
        {line for line in load_text(name).text.split("\n") if line}
        for name in ("builtin", "builtin-eval")
    )
    assert len(evaluation) > 100
    assert not calibration & evaluation


def test_a_file_is_named_without_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "ma vie ☕.txt"
    file.write_bytes("Là-haut.\n".encode())
    text = load_text(file)
    assert text.text == "Là-haut.\n"
    assert text.origin == file.name
    assert text.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"GGUF\x03\x00\x00\x00", "binary"),
        ("Grüße aus Köln".encode("latin-1"), "not UTF-8"),
    ],
)
def test_an_unusable_text_is_a_usage_error(tmp_path: Path, content: bytes, reason: str) -> None:
    """Row 8."""
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        load_text(file)


def test_a_missing_text_or_a_directory_is_a_usage_error(tmp_path: Path) -> None:
    """Row 8."""
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            load_text(path)


def test_windows_are_runs_of_the_text() -> None:
    windows = sample_windows(range(1000), 50, 16, seed=0)
    assert windows.shape == (50, 16)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(16))
    assert windows.min() >= 0
    assert windows.max() < 1000


def test_the_same_seed_draws_the_same_windows() -> None:
    draws = [sample_windows(range(1000), 8, 16, seed) for seed in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_windows_of_a_long_text_share_no_token() -> None:
    windows = sample_windows(range(1000), 62, 16, seed=3)
    assert len(windows.unique()) == 62 * 16


def test_from_a_short_text_every_start_can_be_drawn_the_last_one_too() -> None:
    starts = sample_windows(range(10), 500, 8, seed=0)[:, 0]
    assert sorted(set(starts.tolist())) == [0, 1, 2]


@pytest.mark.parametrize("tokens", [50, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_windows_that_judge_share_no_token_with_the_others(tokens: int, seed: int) -> None:
    windows = sample_windows(range(tokens), 32, 8, seed, held_out=3)
    fitted, judging = set(windows[:-3].flatten().tolist()), windows[-3:].flatten().tolist()
    assert windows.shape == (32, 8)
    assert len(set(judging)) == 3 * 8
    assert not fitted & set(judging)


def test_a_text_too_short_to_hold_windows_out_says_what_is_needed() -> None:
    with pytest.raises(UsageError, match="has 31 tokens, one window beside 3 that judge needs 32"):
        sample_windows(range(31), 32, 8, seed=0, held_out=3)
    assert len(sample_windows(range(32), 32, 8, seed=0, held_out=3)) == 32


def test_a_text_as_long_as_one_window_is_enough() -> None:
    assert torch.equal(sample_windows(range(5), 2, 5, seed=0), torch.arange(5).expand(2, 5))


@pytest.mark.parametrize("tokens", [0, 1, 15])
def test_too_short_a_text_names_what_there_is_and_what_is_needed(tokens: int) -> None:
    """Row 8."""
    with pytest.raises(UsageError, match=f"has {tokens} tokens, one window needs 16"):
        sample_windows(range(tokens), 4, 16, seed=0)


@pytest.mark.parametrize(("count", "length"), [(0, 16), (-1, 16), (4, 0)])
def test_no_windows_at_all_is_a_usage_error(count: int, length: int) -> None:
    """Row 8: no mean is ever taken over zero samples."""
    with pytest.raises(UsageError, match="at least 1"):
        sample_windows(range(100), count, length, seed=0)
