"""Streaming answers of one model in the terminal. Knows the engine's events, not how they come."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

from ..errors import RequestError
from ..runtime.engine import Engine
from ..runtime.llm import Completion
from ..runtime.model import Model
from ..runtime.params import SamplingParams
from ..runtime.request import Failed, Finished, GenerationRequest, TextDelta
from .console import Console
from .flags import Sampling


class Speaker:
    """One model behind one engine, answering one request at a time."""

    def __init__(self, model: Model, sampling: Sampling, stop: tuple[str, ...] = ()) -> None:
        """Raises RequestError if the sampling flags are out of range."""
        self.model = model
        self._params = SamplingParams(**vars(sampling), stop=stop)
        self._engine = Engine(model)
        self._ids = map(str, itertools.count())

    def say(
        self, prompt: Sequence[int], write: Callable[[str], None], goes_on: bool = False
    ) -> Completion:
        """Answer a prompt, writing the text as it comes. An interrupt aborts the request.

        `goes_on` says that the text goes on from the prompt's, as a chat's does not.

        Raises:
            RequestError: the prompt does not fit the context.
        """
        request = GenerationRequest(next(self._ids), tuple(prompt), self._params, goes_on=goes_on)
        text: list[str] = []
        tokens: list[int] = []
        events = self._engine.stream(request)
        try:
            for event in events:
                if isinstance(event, TextDelta):
                    write(event.text)
                    text.append(event.text)
                    tokens.extend(event.token_ids)
                elif isinstance(event, Finished):
                    last = event
                elif isinstance(event, Failed):
                    raise event.error
        except KeyboardInterrupt:
            self._engine.abort(request.id)
            raise
        return Completion("".join(text), tuple(tokens), last.reason, last.usage, last.timings)

    def __enter__(self) -> Speaker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._engine.close()


def talk(speaker: Speaker, console: Console) -> list[dict[str, str]]:
    """Read a line, answer it, until the input ends. What was said before is part of the prompt.

    Gives back all that was said.

    Raises:
        RequestError: the model has no chat template, or the talk has outgrown the context.
    """
    messages: list[dict[str, str]] = []
    console.tell(f"{speaker.model.name}: Ctrl-C ends an answer, Ctrl-D the talk")
    while (question := _read(console)) is not None:
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        heard: list[str] = []

        def write(piece: str, heard: list[str] = heard) -> None:
            heard.append(piece)
            console.write(piece)

        try:
            speaker.say(speaker.model.tokenizer.apply_chat_template(messages), write)
        except KeyboardInterrupt:
            console.tell("\n(ended)")
        except RequestError as error:
            if error.code == "context_length_exceeded" and len(messages) > 1:
                raise RequestError(error.message, hint="start a new talk") from error
            raise
        console.write("\n")
        messages.append({"role": "assistant", "content": "".join(heard)})
    return messages


def _read(console: Console) -> str | None:
    """One line of input; None at its end, or when the wait for it is interrupted."""
    prompt = "> " if console.interactive else ""
    if console.json_mode:  # where `input` writes its prompt depends on how it reads
        if sys.stdin.isatty() and sys.stderr.isatty():
            console.write("> ")
        prompt = ""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        console.tell("")
        return None
