"""The command line, driven as a user drives it, on real tiny models.

Most tests call the entry point in this process, to load torch once; what depends on the process
itself (start-up, signals) has one of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import select
import signal
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from halfweave import LLM, Recipe, SamplingParams, __version__
from halfweave.cli.flags import Pruning
from support.command import ENTRY, QUICK, Command, assert_error
from support.tiny import edit_json

VERBS = (
    "prune",
    "recover",
    "inspect",
    "eval",
    "report",
    "bench",
    "generate",
    "chat",
    "serve",
    "import",
)
TEXT = "Two foxes keep every fourth weight; nobody minds the lazy zero. " * 60
START_BUDGET_S = 0.3
# On a processor too slow for that: so many times what the libraries it is made of take to start.
MADE_OF = (sys.executable, "-c", "import typer, rich.console, rich.table")
START_BUDGET = 2.5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def in_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


# ---- start-up


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_start_up_loads_no_heavy_library(flag: str) -> None:
    heavy = "torch", "transformers", "fastapi", "numpy", "safetensors", "rich"
    code = (
        "import sys\nfrom halfweave.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('loaded', [name for name in {heavy} if name in sys.modules])"
    )
    assert in_process(code, flag).stdout.endswith("loaded []\n")


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_start_up_is_quick(flag: str) -> None:
    """In processor time, which is the wall time of an idle machine: tests share theirs."""

    def seconds(command: Sequence[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    seconds([*ENTRY, flag])  # warms the file cache
    turns = [(seconds([*ENTRY, flag]), seconds(MADE_OF)) for _ in range(5)]
    ours, least = (statistics.median(column) for column in zip(*turns, strict=True))
    assert ours < max(START_BUDGET_S, START_BUDGET * least)


def test_the_version_is_printed(halfweave: Command) -> None:
    assert halfweave("--version").out == f"halfweave {__version__}\n"


def test_help_names_every_verb_within_100_columns(halfweave: Command) -> None:
    ran = halfweave("--help")
    assert ran.code == 0
    assert all(re.search(rf"^  {verb} ", ran.out, re.M) for verb in VERBS)
    for verb in VERBS:
        assert all(len(line) <= 100 for line in halfweave(verb, "--help").out.split("\n"))


def test_help_tells_the_recipe_s_real_defaults() -> None:
    default = Recipe()
    # Which format each linear gets is for a recipe file, or for a budget, to say.
    assert {f.name for f in fields(Pruning)} == {f.name for f in fields(Recipe)} - {"choices"}
    for name, hint in get_type_hints(Pruning, include_extras=True).items():
        assert get_origin(hint) is Annotated
        told = re.search(r"\[(.*)\]$", get_args(hint)[1].help)
        value = getattr(default, name)
        assert (told[1] if told else "False") == str(value)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("prun",), "No such command 'prun'. Did you mean 'prune'", "halfweave --help"),
        (("prune", "x"), "Missing argument 'OUT'", "halfweave prune --help"),
        (("eval", "x", "--windwo", "3"), "No such option", "halfweave eval --help"),
        (("eval", "x", "--window", "many"), "Invalid value for '--window'", "eval --help"),
    ],
)
def test_a_wrong_call_exits_2(
    halfweave: Command, arguments: tuple[str, ...], error: str, hint: str
) -> None:
    assert_error(halfweave(*arguments), 2, error, hint)


@pytest.mark.parametrize(
    "verb", ["prune", "inspect", "eval", "report", "bench", "generate", "chat", "serve"]
)
def test_row_1_a_path_that_is_no_directory_exits_2_and_says_which(
    halfweave: Command, tmp_path: Path, verb: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    more = {"prune": (tmp_path / "out",), "generate": ("-p", "x")}.get(verb, ())
    assert_error(halfweave(verb, tmp_path / "absent", *more), 2, "does not exist")
    assert_error(halfweave(verb, file, *more), 2, "is a file")
    assert_error(halfweave(verb, "org/name", *more), 2, "does not download", "hf download org/name")


def test_no_verb_at_all_shows_the_help_and_exits_2(halfweave: Command) -> None:
    ran = halfweave()
    assert ran.code == 2
    assert ran.out.startswith("Usage: halfweave")


def test_row_2_pickled_weights_are_refused_with_3(
    halfweave: Command, copy_of: Callable[[Path], Path], tiny_model: Path
) -> None:
    directory = copy_of(tiny_model)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert_error(halfweave("inspect", directory), 3, "pickled weights", "save_pretrained")


def test_half_a_shard_exits_1_and_names_the_file_and_the_fix(
    halfweave: Command, pruned: Path
) -> None:
    shard = sorted(pruned.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert_error(halfweave("inspect", pruned), 1, shard.name, "copy it again")


def test_row_25_a_flipped_bit_is_found_by_inspect(halfweave: Command, pruned: Path) -> None:
    shard = sorted(pruned.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert_error(halfweave("inspect", pruned), 1, f"{shard.name} is damaged")
    assert "no file was compared" in halfweave("inspect", pruned, "--no-verify").out


def test_row_11_an_output_that_is_taken_is_refused(
    halfweave: Command, tiny_model: Path, pruned: Path
) -> None:
    ran = halfweave("prune", tiny_model, pruned, *QUICK)
    assert ran.code == 3
    assert f"error: {pruned} holds a finished model" in ran.err
    assert "next: add --overwrite" in ran.err
    assert halfweave("prune", tiny_model, pruned, *QUICK, "--overwrite").code == 0


def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    halfweave: Command, tmp_path: Path
) -> None:
    quiet, loud = (halfweave("inspect", tmp_path / "absent", *f) for f in ((), ("--debug",)))
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err
    assert quiet.code == loud.code == 2


def test_a_bug_is_called_one_in_two_lines(
    halfweave: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr("halfweave.cli.verbs.load", fail)
    assert_error(halfweave("generate", tiny_model, "-p", "x"), 1, "unexpected", "--debug")


def test_text_that_is_not_utf8_is_refused(halfweave: Command, tiny_model: Path) -> None:
    """Python reads such bytes as halves of surrogate pairs."""
    for flags in (("-p", "caf\udce9"), ("-p", "-")):
        ran = halfweave("generate", tiny_model, *flags, stdin="caf\udce9")
        assert_error(ran, 2, "the text is not UTF-8")


def test_sampling_flags_out_of_range_exit_2(halfweave: Command, tiny_model: Path) -> None:
    ran = halfweave("generate", tiny_model, "-p", "x", "--temperature", "3")
    assert_error(ran, 2, "temperature must be between 0 and 2")


def test_a_text_that_is_missing_or_short_exits_2(
    halfweave: Command, tiny_model: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    short.write_text("Too short.")
    assert_error(halfweave("eval", tiny_model, "--text", tmp_path / "no"), 2, "cannot be read")
    ran = halfweave("eval", tiny_model, "--text", short, "--window", 64)
    assert_error(ran, 2, "one window needs 64", "--window")


def test_bench_of_a_pruned_model_alone_exits_2(halfweave: Command, packed_model: Path) -> None:
    assert_error(halfweave("bench", packed_model), 2, "no dense baseline", "--against")


# ---- inspect, eval, bench


def test_inspect_shows_formats_errors_sizes_hashes_provenance_and_kernels(
    halfweave: Command, pruned: Path
) -> None:
    out = halfweave("inspect", pruned).out
    assert "14 linears" in out
    assert re.search(r"weights \S+ KiB, 0\.\d{3} of \S+ KiB dense", out)
    assert "method magnitude, pattern 2:4" in out
    assert f"pruned from tiny by halfweave {__version__}" in out
    assert re.search(r"\d+ files have the SHA-256 of the manifest", out)
    assert "kernel for sparse24: " in out
    roof = r"a token reads \S+ KiB; \d+ threads read [\d.]+ GB/s here: at most \d+ tokens/s alone"
    assert re.search(roof, out)


def test_inspect_tells_the_tiles_of_a_gpu_that_is_not_there(
    halfweave: Command, pruned: Path
) -> None:
    ran = halfweave("inspect", pruned, "--card", "RTX 4090")
    assert ran.code == 0
    assert "nothing was measured" in ran.out
    told = halfweave("inspect", pruned, "--card", "RTX 4090", "--json").document["tiles"]
    assert {row["tokens"] for row in told} == {1, 8, 32, 128, 512}
    assert {tuple(row["tile"])[1] for row in told} == {8, 32, 64}
    wide = halfweave("inspect", pruned, "--card", "H200", "--json").document["tiles"]
    assert {row["tile"] and row["tile"][1] for row in wide} == {8, 32, 64}  # 512 floats are few
    assert all(row["roof_us"] > 0 for row in told)
    assert_error(halfweave("inspect", pruned, "--card", "Voodoo"), 2, "Voodoo.*none of A100-80GB")


def test_inspect_lists_every_linear_and_gives_the_same_as_json(
    halfweave: Command, pruned: Path
) -> None:
    listed = halfweave("inspect", pruned, "--layers").out
    found = halfweave("inspect", pruned, "--json").document["result"]
    assert len(found["linears"]) == 14
    for linear in found["linears"]:
        assert re.search(rf"^{re.escape(linear['name'])} .* {linear['bytes']} ", listed, re.M)
    kept, mask = linear["shape"][0] * linear["shape"][1] // 2, linear["shape"][1] // 8
    assert linear["bytes"] == 4 * kept + linear["shape"][0] * mask  # fp32 values and nibbles
    linears = sum(linear["bytes"] for linear in found["linears"])
    assert linears < found["roof"]["token_bytes"] < 2 * found["weight_bytes"]  # and the head
    assert found["roof"]["read_bytes_per_second"] > 1e8


def test_inspect_of_a_dense_model_says_that_nothing_vouches(
    halfweave: Command, tiny_model: Path
) -> None:
    out = halfweave("inspect", tiny_model).out
    assert "no file was compared with a hash" in out
    assert "kernel for dense: " in out


def test_eval_prints_the_dense_model_first(
    halfweave: Command, packed_model: Path, tiny_model: Path, text: Path
) -> None:
    flags = ("--text", text, "--window", 64, "--no-save")
    ran = halfweave("eval", packed_model, "--against", tiny_model, *flags)
    rows = ran.out.splitlines()
    assert rows[0].split()[:2] == ["model", "perplexity"]
    assert [row.split()[0] for row in rows[1:3]] == ["tiny", "packed"]
    assert rows[3].startswith("text: text.txt, SHA-256 ")
    assert ran.err.splitlines()[-1].startswith("window ")


def test_eval_json_has_exact_counts(halfweave: Command, tiny_model: Path, text: Path) -> None:
    flags = ("--text", text, "--window", 64, "--max-windows", 3, "--no-save", "--json")
    result = halfweave("eval", tiny_model, *flags).document["result"]
    assert result["tokens"] == result["windows"] * 63
    assert result["kl"] is None


def test_bench_ends_with_a_table_and_a_json_line(
    halfweave: Command, packed_model: Path, tiny_model: Path, text: Path
) -> None:
    words = ("--text", text, "--window", 64, "--prompt-tokens", 16, "--new-tokens", 4)
    flags = (*words, "--repetitions", 5, "--batch", 2, "--even-if-busy", "--no-save")
    exact = ("--dtype", "float32")  # weights are then expanded, which is worth a note
    ran = halfweave("bench", packed_model, "--against", tiny_model, *flags, *exact, "--json")
    assert [m["name"] for m in ran.document["models"]] == ["tiny", "packed"]
    for row in ("perplexity", "decode, tokens/s", "TTFT, ms", "kernel", "machine:", "note: packed"):
        assert re.search(rf"^{row}", ran.err, re.M)
    *table, last = halfweave(
        "bench", packed_model, "--against", tiny_model, *flags
    ).out.splitlines()
    assert "tiny, baseline" in table[0]
    assert all(len(line) <= 100 for line in table)
    assert json.loads(last)["kind"] == "offline"


# ---- generate, chat, serve, import


GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def test_generate_streams_what_the_library_returns(halfweave: Command, tiny_model: Path) -> None:
    with LLM(tiny_model) as llm:
        expected = llm.generate("Two weights", GREEDY)[0]
    flags = ("--temperature", 0, "--max-tokens", 12)
    ran = halfweave("generate", tiny_model, "-p", "Two weights", *flags)
    assert (ran.out, ran.err) == (expected.text + "\n", "")
    document = halfweave("generate", tiny_model, "-p", "Two weights", *flags, "--json").document
    assert document["result"]["text"] == expected.text
    assert document["result"]["token_ids"] == list(expected.token_ids)
    assert document["result"]["usage"]["completion_tokens"] == 12


def test_generate_reads_its_prompt_from_stdin(halfweave: Command, tiny_model: Path) -> None:
    flags = ("--temperature", 0, "--max-tokens", 12)
    given = halfweave("generate", tiny_model, "-p", "Two weights", *flags)
    piped = halfweave("generate", tiny_model, "-p", "-", *flags, stdin="Two weights")
    assert piped.out == given.out


def test_a_flag_can_come_from_the_environment(
    halfweave: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFWEAVE_GENERATE_MAX_TOKENS", "3")
    document = halfweave("generate", tiny_model, "-p", "Two", "--json").document
    assert document["result"]["usage"]["completion_tokens"] == 3


def test_chat_remembers_the_talk_and_ends_with_its_input(
    halfweave: Command, tiny_model: Path
) -> None:
    with LLM(tiny_model) as llm:
        talk = [{"role": "user", "content": "Hello"}]
        first = llm.chat(talk, GREEDY).text
        talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "More"}]
        second = llm.chat(talk, GREEDY).text
    flags = ("--temperature", 0, "--max-tokens", 12)
    ran = halfweave("chat", tiny_model, *flags, stdin="Hello\n\nMore\n")
    assert (ran.code, ran.out) == (0, f"{first}\n{second}\n")


def test_chat_gives_all_that_was_said_as_one_document(halfweave: Command, tiny_model: Path) -> None:
    flags = ("--temperature", 0, "--max-tokens", 12)
    said = halfweave("chat", tiny_model, *flags, stdin="Hello\n\nMore\n").out.splitlines()
    ran = halfweave("chat", tiny_model, *flags, "--json", stdin="Hello\n\nMore\n")
    assert ran.code == 0
    roles = ["user", "assistant", "user", "assistant"]
    texts = ["Hello", said[0], "More", said[1]]
    assert ran.document == {
        "verb": "chat",
        "messages": [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)],
    }
    assert said[0] in ran.err


def test_chat_asks_on_stderr_where_stdout_is_for_the_document(tiny_model: Path) -> None:
    """With readline, which writes prompts to stdout, and on a terminal for each of the three."""
    entry = (sys.executable, "-c", f"import readline; {ENTRY[2]}")
    (typed, keys), (shown, screen), (told, notes) = (pty.openpty() for _ in range(3))
    command = [*entry, "chat", str(tiny_model), "--json"]
    with subprocess.Popen(command, stdin=keys, stdout=screen, stderr=notes) as process:
        heard = b""
        try:
            while b"the talk\r\n> " not in heard:
                assert select.select([told], [], [], 60)[0], heard
                heard += os.read(told, 4096)
            # What comes while readline takes over the terminal may be lost.
            for _ in range(60):
                os.write(typed, b"\x04")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                    break
            assert process.poll() == 0
        finally:
            process.kill()
    written = os.read(shown, 4096).replace(b"\x1b[?2004h", b"").replace(b"\x1b[?2004l\r", b"")
    for file in (typed, keys, shown, screen, told, notes):
        os.close(file)
    assert json.loads(written) == {"verb": "chat", "messages": []}


def test_chat_without_a_template_exits_2(
    halfweave: Command, copy_of: Callable[[Path], Path], tiny_model: Path
) -> None:
    directory = copy_of(tiny_model)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(directory / "tokenizer_config.json", lambda c: c.pop("chat_template", None))
    ran = halfweave("chat", directory, stdin="Hello\n")
    assert ran.code == 2
    assert "error: the model has no chat template" in ran.err


@pytest.fixture
def server(tiny_model: Path) -> Iterator[subprocess.Popen[str]]:
    command = [*ENTRY, "serve", str(tiny_model), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_serve_prints_its_address_and_how_to_ask_and_ends_with_ctrl_c(
    server: subprocess.Popen[str],
) -> None:
    assert server.stdout is not None
    lines = [server.stdout.readline() for _ in range(7)]
    url = lines[0].removeprefix("serving tiny at ").strip()
    assert lines[1].startswith(f"curl {url}/v1/chat/completions ")
    assert lines[3] == "from openai import OpenAI\n"
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        assert json.load(answer)["data"][0]["id"] == "tiny"
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == 0


def test_import_of_a_file_that_is_no_gguf_says_so(halfweave: Command, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    ran = halfweave("import", file, tmp_path / "out")
    assert ran.code == 2
    assert str(file) in ran.err
    file.write_bytes(b"nothing of the kind")
    ran = halfweave("import", file, tmp_path / "out")
    assert ran.code == 1
    assert "error: " in ran.err
