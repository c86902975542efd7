"""How the command line says numbers, and what it makes of values that JSON does not have."""

import json
import math

import pytest
from halfweave.cli.console import Console, duration, size


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.6, "8s"), (59.6, "1m00s"), (220, "3m40s"), (7500, "2h05m")]
)
def test_durations_read_like_speech(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(1023, "1023 B"), (1024, "1.0 KiB"), (270 * 2**20, "270.0 MiB")]
)
def test_sizes_have_binary_units(count: int, words: str) -> None:
    assert size(count) == words


def test_a_document_has_null_where_json_has_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    Console(json_mode=True).document({"ppl": math.inf, "gaps": (1.5, math.nan)})
    assert json.loads(capsys.readouterr().out) == {"ppl": None, "gaps": [1.5, None]}


def test_people_read_stderr_when_machines_read_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for json_mode in (True, False):
        console = Console(json_mode)
        console.say("a figure")
        console.document({"figure": 1})
        captured = capsys.readouterr()
        assert ("a figure" in captured.err, "a figure" in captured.out) == (
            json_mode,
            not json_mode,
        )
        assert ("{" in captured.out) == json_mode


def test_progress_says_so_while_the_whole_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(json_mode=False).progress("token") as bar:
        bar.line(1024, 0, "read", 1.0, 0.0)
        bar.line(2048, 4096, "read", 1.0, 2.0)
    assert capsys.readouterr().err.splitlines() == [
        "token 1024/? read 1.0 s eta ?",
        "token 2048/4096 read 1.0 s eta 2s",
    ]
