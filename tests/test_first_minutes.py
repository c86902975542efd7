"""The first five minutes of a user: the installed command, one step after the other, on one model.

Names are relative, as they are typed, so that a line is as wide as it will be.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from support.tiny import save_tiny

HALFWEAVE = Path(sys.executable).parent / "halfweave"
WIDTH = 100
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
CALIBRATION = ("--calib-windows", "8", "--calib-length", "64")
MOST_PRUNE_S, MOST_DRAIN_S = 120.0, 2.0


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh directory with a model in it."""
    desk = tmp_path_factory.mktemp("desk")
    save_tiny(desk / "tiny")
    return desk


def typed(desk: Path, line: str, code: int = 0) -> tuple[list[str], list[str]]:
    """Lines of stdout and stderr of one command line."""
    words = line.split()
    assert words[0] == "halfweave"
    ran = subprocess.run(
        [HALFWEAVE, *words[1:]],
        cwd=desk,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == code, ran.stderr
    out, err = ran.stdout.splitlines(), ran.stderr.splitlines()
    wide = [text for text in (*out, *err) if len(text) > WIDTH and not text.startswith("{")]
    assert not wide, wide
    return out, err


@pytest.fixture(scope="module")
def pruned(desk: Path) -> tuple[list[str], list[str], float]:
    """What `prune` said, and how long it took."""
    started = time.monotonic()
    out, err = typed(desk, f"halfweave prune tiny out {' '.join(CALIBRATION)}")
    return out, err, time.monotonic() - started


def test_help_names_the_verbs_and_each_verb_its_flags(desk: Path) -> None:
    out, err = typed(desk, "halfweave --help")
    assert not err
    verbs = re.findall(r"^  ([a-z]+) ", "\n".join(out), re.M)
    assert {"prune", "inspect", "eval", "bench", "report", "serve", "chat"} <= set(verbs)
    for verb in ("prune", "eval", "bench", "report", "serve"):
        assert "--json" in "\n".join(typed(desk, f"halfweave {verb} --help")[0])


def test_prune_shows_a_plan_a_line_a_layer_and_the_next_command(
    pruned: tuple[list[str], list[str], float],
) -> None:
    out, err, seconds = pruned
    assert err[0].startswith("plan: 14 linears in 2 blocks to sparse24")
    layers = [line for line in err if re.match(r"linear \d+/14 .* err 0\.\d+ .* eta \d+s", line)]
    assert len(layers) == 14
    assert any(re.match(r"down_proj +2 +0\.\d+ +0\.\d+ +sparse24", line) for line in out)
    assert out[-1] == "next: halfweave eval out --against tiny"
    assert seconds < MOST_PRUNE_S


def test_eval_prints_two_rows(desk: Path, pruned: object) -> None:
    out, _ = typed(desk, "halfweave eval out --against tiny --window 64 --max-windows 4")
    assert out[0].split()[:2] == ["model", "perplexity"]
    assert [line.split()[0] for line in out[1:3]] == ["tiny", "out"]
    assert (desk / "out" / "measured" / "eval.json").is_file()


def test_serve_says_how_to_ask_and_ctrl_c_drains(desk: Path, pruned: object) -> None:
    command = [HALFWEAVE, "serve", "out", "--port", "0"]
    with subprocess.Popen(
        command,
        cwd=desk,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().rstrip("\n") for _ in range(7)]
            url = lines[0].removeprefix("serving out at ")
            assert lines[1].startswith(f"curl {url}/v1/chat/completions ")
            assert lines[3] == "from openai import OpenAI"
            assert all(len(line) <= WIDTH for line in lines)
            answer = subprocess.run(
                f"{lines[1]}\n{lines[2]}", shell=True, capture_output=True, text=True, timeout=60
            )
            assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"
            with urllib.request.urlopen(url, timeout=30) as page:
                assert b"halfweave playground" in page.read()
            process.send_signal(signal.SIGINT)
            asked = time.monotonic()
            assert process.wait(timeout=30) == 0
            assert time.monotonic() - asked < MOST_DRAIN_S
        finally:
            process.kill()


def test_bench_ends_with_a_table_and_a_json_line(desk: Path, pruned: object) -> None:
    flags = "--prompt-tokens 32 --new-tokens 8 --window 64 --max-windows 2 --batch 1 --batch 2"
    out, _ = typed(desk, f"halfweave bench out --against tiny {flags} --even-if-busy")
    assert any(line.startswith("perplexity") for line in out)
    assert any(line.startswith("decode") for line in out)
    document = json.loads(out[-1])
    assert [model["name"] for model in document["models"]] == ["tiny", "out"]


def test_report_shows_what_was_measured(desk: Path, pruned: object) -> None:
    pytest.importorskip("matplotlib")
    out, _ = typed(desk, "halfweave report out")
    assert "drawn: Quality against size and speed" in out
    assert (desk / "out" / "report.html").stat().st_size > 10_000


def test_half_a_shard_is_named_with_the_fix(desk: Path, pruned: object) -> None:
    """Last, since it spoils the model."""
    shard = sorted((desk / "out").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    try:
        out, err = typed(desk, "halfweave inspect out", code=1)
    finally:
        shard.write_bytes(whole)
    assert not out
    assert err[0].startswith("error: ") and shard.name in err[0]
    assert err[1].startswith("next: ") and "copy it again" in err[1]
    assert len(err) == 2
