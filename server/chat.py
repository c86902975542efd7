"""POST /v1/chat/completions: a conversation in, the assistant's next turn out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import RequestError
from ..runtime.request import Finished, SamplingParams
from .body import JsonRoute
from .disconnect import unless_disconnected
from .documents import GENERATION_ERRORS, answer, json_or_stream
from .engine_call import EngineCall, Output
from .protocol import ChatBody
from .responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    finish_reason,
    timings_of,
    usage_of,
)
from .service import Service
from .stream import EventStream


def chat_router(service: Service) -> APIRouter:
    """The route that continues conversations."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: json_or_stream(ChatCompletion), **GENERATION_ERRORS},
    )
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer a conversation, through the model's chat template."""
        call = await _admit(service, body)
        writer = _Writer(call.id, service.name, body.include_usage)
        if body.stream:
            return EventStream(call, writer, service.settings.ping_s)
        try:
            return answer(writer.whole(await unless_disconnected(request, call.outputs())))
        finally:
            call.close()

    return router


async def _admit(service: Service, body: ChatBody) -> EngineCall:
    service.check_model(body.model)
    service.check_open()
    messages = [message.for_template() for message in body.messages]
    longest, limit = service.model.max_model_len, body.token_limit

    def tokenize() -> list[list[int]]:
        return [service.model.tokenizer.apply_chat_template(messages)]

    def params(prompt_tokens: int) -> SamplingParams:
        return body.sampling(max(1, longest - prompt_tokens) if limit is None else limit)

    try:
        return await EngineCall.admit(service.engine, "chatcmpl", tokenize, params)
    except RequestError as error:
        # The engine knows prompts; this client wrote messages.
        param = "messages" if error.param == "prompt" else error.param
        raise RequestError(error.message, param, error.code) from error


@dataclass(frozen=True)
class _Writer:
    """Writes one request's answer: whole, or as the `Chunks` of a stream."""

    id: str
    model: str
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, outputs: Sequence[Output]) -> ChatCompletion:
        """All choices at once."""
        ends = [output.end for output in outputs]
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[_choice(index, output) for index, output in enumerate(outputs)],
            usage=usage_of(ends),
            timings=timings_of(ends),
        )

    def first(self, index: int) -> ChatChunk:
        """Who speaks."""
        return self._chunk(index, Delta(role="assistant", content=""))

    def text(self, index: int, text: str) -> ChatChunk:
        """More of what is said."""
        return self._chunk(index, Delta(content=text))

    def last(self, index: int, end: Finished) -> ChatChunk:
        """The end of the turn, with its timings."""
        chunk = self._chunk(index, Delta())
        chunk.choices[0].finish_reason = finish_reason(end)
        chunk.timings = timings_of([end])
        return chunk

    def usage(self, ends: Sequence[Finished]) -> ChatChunk | None:
        """Tokens of the request, if asked for."""
        if not self.include_usage:
            return None
        chunk = self._empty_chunk()
        chunk.usage = usage_of(ends)
        return chunk

    def _chunk(self, index: int, delta: Delta) -> ChatChunk:
        chunk = self._empty_chunk()
        chunk.choices.append(
            ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
        )
        if self.include_usage:
            chunk.usage = None  # now it is set, and so is written
        return chunk

    def _empty_chunk(self) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=[],
        )


def _choice(index: int, output: Output) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=AssistantMessage(role="assistant", content=output.text, refusal=None),
        logprobs=None,
        finish_reason=finish_reason(output.end),
    )
