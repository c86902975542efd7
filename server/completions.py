"""POST /v1/completions: prompts in, their continuations out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..runtime.request import Finished
from .body import JsonRoute
from .disconnect import unless_disconnected
from .documents import GENERATION_ERRORS, answer, json_or_stream
from .engine_call import EngineCall, Output
from .errors import ApiError
from .protocol import CompletionBody
from .responses import Completion, CompletionChoice, finish_reason, timings_of, usage_of
from .service import Service
from .stream import EventStream


def completions_router(service: Service) -> APIRouter:
    """The route that continues prompts."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/v1/completions",
        response_model=None,
        responses={200: json_or_stream(Completion), **GENERATION_ERRORS},
    )
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Continue one or several prompts; a choice for each, in their order."""
        call = await _admit(service, body)
        writer = _Writer(call.id, service.name, body.include_usage)
        if body.stream:
            return EventStream(call, writer, service.settings.ping_s)
        try:
            return answer(writer.whole(await unless_disconnected(request, call.outputs())))
        finally:
            call.close()

    return router


async def _admit(service: Service, body: CompletionBody) -> EngineCall:
    service.check_model(body.model)
    service.check_open()
    prompts, most = body.prompts, service.settings.max_prompts
    if len(prompts) > most:
        raise ApiError(400, f"{len(prompts)} prompts given, at most {most}", param="prompt")
    params = body.sampling(body.token_limit)
    encode = service.model.tokenizer.encode

    def tokenize() -> list[list[int]]:
        return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    return await EngineCall.admit(service.engine, "cmpl", tokenize, lambda _: params)


@dataclass(frozen=True)
class _Writer:
    """Writes one request's answer: whole, or as the `Chunks` of a stream."""

    id: str
    model: str
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, outputs: Sequence[Output]) -> Completion:
        """All choices at once."""
        ends = [output.end for output in outputs]
        completion = self._completion(
            [_choice(index, output.text, output.end) for index, output in enumerate(outputs)]
        )
        completion.usage = usage_of(ends)
        completion.timings = timings_of(ends)
        return completion

    def first(self, index: int) -> None:
        """Nothing: a choice begins with its text."""

    def text(self, index: int, text: str) -> Completion:
        """More text of a choice."""
        return self._chunk([_choice(index, text, None)])

    def last(self, index: int, end: Finished) -> Completion:
        """The end of a choice, with its timings."""
        chunk = self._chunk([_choice(index, "", end)])
        chunk.timings = timings_of([end])
        return chunk

    def usage(self, ends: Sequence[Finished]) -> Completion | None:
        """Tokens of all choices, if asked for."""
        if not self.include_usage:
            return None
        chunk = self._completion([])
        chunk.usage = usage_of(ends)
        return chunk

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        chunk = self._completion(choices)
        if self.include_usage:
            chunk.usage = None  # now it is set, and so is written
        return chunk

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
        )


def _choice(index: int, text: str, end: Finished | None) -> CompletionChoice:
    reason = None if end is None else finish_reason(end)
    return CompletionChoice(index=index, text=text, logprobs=None, finish_reason=reason)
