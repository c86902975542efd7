"""Every long verb says what it would do, and does it not; and tells how far it is."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import ENTRY, QUICK, Command, assert_error


def written(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_a_dry_recovery_says_for_how_long_on_what(
    halfweave: Command, tiny_model: Path, pruned: Path, tmp_path: Path
) -> None:
    before, license_ = written(tmp_path), Path(__file__).parents[1] / "LICENSE"
    flags = ("--parent", tiny_model, "--calib", license_, "--dry-run")
    ran = halfweave("recover", pruned, tmp_path / "new", *flags, "--minutes", 2)
    assert re.search(r"^plan: 2m00s of training on \d+ windows of 256 tokens$", ran.out, re.M)
    assert re.search(
        r"^  in \w+, at most [\d.]+ MiB of memory and [\d.]+ [KM]iB of the disk here$",
        ran.out,
        re.M,
    )
    plan = halfweave("recover", pruned, tmp_path / "new", *flags, "--tokens", 5120, "--json")
    assert (plan.document["plan"]["tokens"], plan.document["dry_run"]) == (5120, True)
    assert written(tmp_path) == before
    wrong = halfweave("recover", tiny_model, tmp_path / "new", *flags)
    assert_error(wrong, 3, "halfweave.json|not made by halfweave")


def test_a_dry_run_is_refused_where_the_run_would_be(
    halfweave: Command, tiny_model: Path, pruned: Path, tmp_path: Path
) -> None:
    """Row 11."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine")
    dry = ("--dry-run", *QUICK)
    assert_error(halfweave("prune", tiny_model, tiny_model, *dry), 3, "is the input")
    assert_error(halfweave("prune", tiny_model, taken, *dry), 3, "holds other files")
    assert_error(halfweave("prune", tiny_model, pruned, *dry), 3, "a finished model", "--overwrite")
    assert halfweave("prune", tiny_model, pruned, "--overwrite", *dry).code == 0
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "out"
    assert_error(halfweave("prune", tiny_model, below, *dry), 2, "file is a file", "another")
    assert halfweave("prune", tiny_model, below, *QUICK).code == 2
    text = halfweave("prune", tiny_model, tmp_path / "new", *dry, "--calib", tmp_path / "absent")
    assert_error(text, 2, "cannot be read")
    many = ("--method", "admm", "--calib-windows", 100000, "--calib-length", 256)
    windows = halfweave("prune", tiny_model, tmp_path / "new", *dry, *many)
    assert_error(windows, 2, "the calibration text has", "fewer --calib-windows")
    flags = ("--parent", tiny_model, "--minutes", 2, "--dry-run")
    assert_error(halfweave("recover", pruned, pruned, *flags), 3, "is the input")
    before = written(tmp_path)
    assert halfweave("prune", tiny_model, tmp_path / "new" / "er", *dry).code == 0
    assert written(tmp_path) == before


def test_dry_compilation_counts_kernels(halfweave: Command) -> None:
    pytest.importorskip("triton")
    plan = halfweave("kernels", "compile", "--arch", "80", "--dry-run", "--json").document["plan"]
    assert plan["architectures"] == [80]
    assert plan["kernels"] > 10
    ran = halfweave("kernels", "compile", "--arch", "80", "--dry-run")
    assert ran.out.startswith(f"plan: {plan['kernels']} kernels for sm 80")
    assert ran.err == ""


def test_a_dry_import_reads_the_table_only(halfweave: Command, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"nothing of the kind")
    assert halfweave("import", file, tmp_path / "out", "--dry-run").code == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_benchmark_says_what_it_would_measure_and_for_how_long(
    halfweave: Command, tiny_model: Path, pruned: Path
) -> None:
    before = written(pruned)
    flags = ("--batch", 1, "--batch", 3, "--prompt-tokens", 8, "--new-tokens", 4, "--window", 32)
    asked = ("bench", pruned, "--against", tiny_model, *flags, "--dry-run")
    ran = halfweave(*asked)
    names = f"{tiny_model.name}, {pruned.name}"
    assert ran.out.startswith(f"plan: {names} in 8 turns, 1 of them to warm up\n")
    assert re.search(r"^  about [\dhms]+ and [\d.]+ [MG]iB of memory here", ran.out, re.M)
    told = halfweave(*asked, "--json", "--repetitions", 20).document
    assert (told["dry_run"], told["kind"], told["plan"]["turns"]) == (True, "offline", 21)
    assert (told["plan"]["batches"], told["plan"]["windows"]) == ([1, 3], 8)
    assert_error(halfweave("bench", pruned, "--dry-run"), 2, "no dense baseline", "--against")
    assert written(pruned) == before


def test_a_dry_benchmark_of_products_lists_them(halfweave: Command, pruned: Path) -> None:
    asked = ("bench", pruned, "kernel", "--tokens", 1, "--tokens", 16, "--dry-run", "--json")
    plan = halfweave(*asked).document["plan"]
    assert (plan["tokens"], plan["repetitions"]) == ([1, 16], 11)
    assert {"format": "sparse24", "N": 136, "K": 72} in plan["products"]


def test_a_dry_load_counts_requests_and_starts_no_server(halfweave: Command, pruned: Path) -> None:
    loads = ("--rate", 2, "--concurrency", 4, "--requests", 6, "--repetitions", 5)
    plan = halfweave("bench", pruned, "serve", *loads, "--dry-run", "--json").document["plan"]
    assert plan == {
        "endpoints": [pruned.name],
        "loads": ["2 req/s", "4 clients"],
        "requests": 60,
        "least_seconds": 15.0,
    }
    wrong = halfweave("bench", pruned, "serve", "--rate", 0, "--dry-run")
    assert_error(wrong, 2, "a rate or concurrency must be above 0")


def on_a_terminal(*arguments: object, columns: int = 100) -> str:
    """What a person sees who runs a command in a terminal of so many columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    command = [*ENTRY, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # Linux's word for the end
                break
            if not piece:
                break
            seen += piece
        process.wait(timeout=120)
    os.close(leader)
    return seen.decode(errors="replace")


def plain(text: str) -> list[str]:
    """Lines without the terminal's own codes."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").split("\n")


def test_a_terminal_shows_a_bar_with_the_time_that_is_left(
    tiny_model: Path, tmp_path: Path
) -> None:
    seen = on_a_terminal("prune", tiny_model, tmp_path / "out", *QUICK)
    assert "\x1b[" in seen
    lines = plain(seen)
    assert any(re.search(r"14/14 .*\d+:\d\d:\d\d.*down_proj err", line) for line in lines)
    assert not any(line.startswith("linear 1/14") for line in lines)
    assert any(line.startswith("next: halfweave eval") for line in lines)


def test_errors_are_folded_on_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    names = ",".join(f"a-task-that-nobody-knows-{number}" for number in range(3))
    seen = on_a_terminal("serve", tiny_model, "--api-key", "short", "--name", names)
    lines = [line for line in plain(seen) if line.strip()]
    assert lines[0].startswith("error: ")
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell: str) -> None:
    # typer looks for the shell that it runs in, which may be none of them, as under make.
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [*ENTRY, "--show-completion", shell]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, env=named)
    assert ran.returncode == 0
    assert "HALFWEAVE_COMPLETE" in ran.stdout.upper()


def test_completion_knows_verbs_and_flags() -> None:
    def offered(words: str) -> set[str]:
        environment = {
            **os.environ,
            "_HALFWEAVE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - (not words.endswith(" "))),
        }
        code = "from halfweave.cli import main; main()"
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        return set(ran.stdout.split())

    assert "prune" in offered("halfweave pr")
    assert "--against" in offered("halfweave eval --ag")
