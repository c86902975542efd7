"""`halfweave bench` as a user types it: what it keeps, what it hides, and servers of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from halfweave.bench.compare import NO_CHANGE, compare
from halfweave.bench.document import about_model, read_document
from halfweave.errors import UsageError
from halfweave.files import sha256_file
from halfweave.report.documents import read_document as report_reads
from halfweave.runtime.model import load_model
from support.command import QUICK, Command, assert_error

TEXT = "Two foxes keep every fourth weight; nobody minds the lazy zero. " * 60
Copy = Callable[[Path], Path]


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfweave.bench.quiet.others_at_work", lambda: {0: 0.0})


@pytest.fixture
def words(tmp_path: Path) -> tuple[object, ...]:
    """Of a quick measurement."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return "--text", text, "--window", 64, "--prompt-tokens", 16, "--new-tokens", 4, "--batch", 1


@pytest.fixture
def mock() -> Iterator[str]:
    command = [sys.executable, "-m", "halfweave.bench.mock_server", "--ttft-ms", "5"]
    with subprocess.Popen(
        [*command, "--gap-ms", "2"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


# ---- what is kept


def test_a_measurement_is_kept_beside_the_model_and_disturbs_nothing(
    halfweave: Command, copy_of: Copy, packed_model: Path, tiny_model: Path, words: tuple[object]
) -> None:
    model = copy_of(packed_model)
    ran = halfweave("bench", model, "--against", tiny_model, *words, "--json")
    document, kept = ran.document, model / "measured" / "offline.json"
    assert read_document(kept) == document
    assert {"created", "command", "hardware", "versions", "commit"} <= document.keys()
    assert document["model"]["digest"] == sha256_file(model / "halfweave.json")
    assert document["model"]["name"] == model.name
    assert document["models"][0]["digest"] == sha256_file(tiny_model / "config.json")
    first = document["created"], kept.stat().st_ino
    halfweave("bench", model, "--against", tiny_model, *words, "--repetitions", 6)
    assert len(read_document(kept)["models"][0]["samples"]) == 6
    assert kept.stat().st_ino != first[1]
    assert [file.name for file in kept.parent.iterdir()] == ["offline.json"]
    assert halfweave("inspect", model).code == 0
    assert load_model(model).name == model.name


def test_compare_of_a_run_with_itself_finds_nothing(
    halfweave: Command, tiny_model: Path, words: tuple[object], tmp_path: Path
) -> None:
    out = tmp_path / "a.json"
    assert halfweave("bench", tiny_model, *words, "--out", out).code == 0
    assert not (tiny_model / "measured").exists()
    ran = halfweave("bench", "--compare", out, out)
    assert ran.out.splitlines()[-2] == "no significant change"
    assert "judged by times and speeds alone" in ran.out
    document = json.loads(out.read_text())
    document["model"]["digest"] = "another"
    other = tmp_path / "b.json"
    other.write_text(json.dumps(document))
    assert_error(halfweave("bench", "--compare", out, other), 3, "not of the same thing", "--even")
    assert halfweave("bench", "--compare", out, other, "--even-if-different").code == 0


def test_a_directory_that_cannot_be_written_is_no_error(
    halfweave: Command, copy_of: Copy, tiny_model: Path, words: tuple[object], tmp_path: Path
) -> None:
    model = copy_of(tiny_model)
    (model / "measured").write_text("a file where the directory should be")
    ran = halfweave("bench", model, *words)
    assert ran.code == 0
    assert "not kept: " in ran.err and "next: the same command with --out FILE" in ran.err
    assert json.loads(ran.out.splitlines()[-1])["kind"] == "offline"


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    halfweave: Command, tiny_model: Path, words: tuple[object], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.json", tmp_path):
        for call in (("bench", tiny_model, *words), ("eval", tiny_model, *words[:4])):
            ran = halfweave(*call, "--out", out)
            assert_error(ran, 2, "cannot be written")
    deep = tmp_path / "deep" / "er" / "x.json"
    assert halfweave("bench", tiny_model, *words, "--out", deep).code == 0
    assert read_document(deep)["kind"] == "offline"


def test_pruning_over_a_model_takes_its_measurements_away_and_from_one_leaves_them(
    halfweave: Command, copy_of: Copy, tiny_model: Path, tmp_path: Path
) -> None:
    dense, out = copy_of(tiny_model), tmp_path / "out"
    for directory in (dense, out):
        (directory / "measured").mkdir(parents=True)
        (directory / "measured" / "offline.json").write_text("{}")
    assert halfweave("prune", dense, out, *QUICK).code == 3  # other files are never overwritten
    (out / "measured" / "offline.json").unlink()
    (out / "measured").rmdir()
    assert halfweave("prune", dense, out, *QUICK).code == 0
    assert not (out / "measured").exists()
    (out / "measured").mkdir()
    (out / "measured" / "offline.json").write_text("{}")
    assert halfweave("inspect", out).code == 0
    assert halfweave("prune", dense, out, *QUICK, "--overwrite").code == 0
    assert not (out / "measured").exists()
    assert (dense / "measured" / "offline.json").exists()


def test_about_a_model(tiny_model: Path, tmp_path: Path) -> None:
    assert about_model(tiny_model)["digest"] == sha256_file(tiny_model / "config.json")
    with pytest.raises(UsageError):
        about_model(tmp_path / "none")


# ---- serve


def test_serve_loads_a_running_endpoint(halfweave: Command, mock: str, tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    load = ("--rate", 50, "--concurrency", 2, "--requests", 4, "--repetitions", 5)
    slos = ("--goodput", "ttft:5000", "tpot:5000")
    key = ("--api-key", "very-secret-key")
    ran = halfweave("bench", "serve", "--url", mock, *load, *slos, *key, "--out", out)
    assert ran.code == 0, ran.err
    *table, last = ran.out.splitlines()
    assert all(len(line) <= 100 for line in table if str(tmp_path) not in line)
    document = json.loads(last)
    assert read_document(out) == document
    assert document["model"] == {"path": None, "name": "mock", "digest": None}
    opened, closed = document["points"]
    assert (opened["mode"], opened["rate"], closed["concurrency"]) == ("open", 50, 2)
    assert closed["completed"] == closed["requests"] == 20
    assert closed["goodput_per_s"] == pytest.approx(closed["requests_per_s"])
    assert document["plan"]["slos"] == {"ttft": 5000, "tpot": 5000}
    assert any("quality of this endpoint" in note for note in document["notes"])
    assert "very-secret-key" not in ran.out + ran.err + out.read_text()
    assert "***" in document["command"]
    assert document["models"] == []
    assert report_reads(out).kind == "serve"


def test_an_endpoint_says_nothing_of_the_model_that_cuts_its_prompts(
    halfweave: Command, copy_of: Copy, packed_model: Path, mock: str
) -> None:
    """Whatever runs there: its figures are not kept as those of the directory."""
    model = copy_of(packed_model)
    load = ("--concurrency", 2, "--requests", 2, "--repetitions", 5, "--prompt-tokens", 16)
    ran = halfweave("bench", model, "serve", "--url", mock, *load, "--json")
    assert ran.code == 0, ran.err
    assert ran.document["model"] == {"path": None, "name": "mock", "digest": None}
    assert not (model / "measured").exists()


def test_serve_starts_servers_of_both_models_and_ends_them(
    halfweave: Command, copy_of: Copy, packed_model: Path, tiny_model: Path, words: tuple[object]
) -> None:
    model = copy_of(packed_model)
    load = ("--concurrency", 2, "--requests", 3, "--repetitions", 5)
    ran = halfweave("bench", model, "--against", tiny_model, "serve", *words[:-2], *load, "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    names = [point["model"] for point in document["points"]]
    assert names == [model.name, tiny_model.name]
    for point in document["points"]:
        assert point["completed"] == 15
        assert point["output_tokens"] == 60
        # Random bytes are not always whole characters, and prompts are cut between tokens.
        assert 13 * 15 <= point["prompt_tokens"] <= 19 * 15
    assert all(document["quality"][name]["ppl"] > 1 for name in names)
    told = [(each["name"], each["is_baseline"]) for each in document["models"]]
    assert told == [(model.name, False), (tiny_model.name, True)]
    found = compare(document, document)
    relative = {each.name for each in found.changes if each.decides}
    assert f"{model.name}, 2 clients: E2E, to dense" in relative
    assert (found.verdict, found.relative) == (NO_CHANGE, True)
    assert (model / "measured" / "serve.json").exists()
    assert "perplexity of" in ran.err


def test_a_measurement_that_is_ended_leaves_no_server_behind(tiny_model: Path) -> None:
    code = (
        "import sys, time\n"
        "from halfweave.bench.server_process import server\n"
        "with server(sys.argv[1]) as running:\n"
        "    print(running.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tiny_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# ---- wrong calls


def test_wrong_calls_exit_2(halfweave: Command, tiny_model: Path, mock: str) -> None:
    for call, said in (
        (("bench",), "a model directory is missing"),
        (("bench", tiny_model, "sideways"), "'sideways' is none of kernel, offline, serve"),
        (("bench", tiny_model, "kernel", "--tokens", 0), "tokens"),
        (("bench", tiny_model, "serve", "--goodput", "itl:5"), "no limit for goodput"),
        (("bench", "serve", "--url", "nowhere"), "no address"),
        (("bench", "serve", "--url", mock, "--against", tiny_model), "--url says that one runs"),
    ):
        ran = halfweave(*call)
        assert (ran.code, said in ran.err) == (2, True), ran.err
        assert ran.out == ""


def test_an_endpoint_that_is_not_there_exits_1(halfweave: Command) -> None:
    assert_error(halfweave("bench", "serve", "--url", "http://127.0.0.1:9"), 1, "lists no models")
