"""POST /v1/chat/completions: a conversation in, the assistant's next turn out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import RequestError
from ..runtime.request import Event, Finished, TextDelta, TokenLogprob
from .auth import caller_of
from .body import JsonRoute
from .chat_body import ChatBody
from .disconnect import unless_disconnected
from .documents import GENERATION_ERRORS, answer, json_or_stream
from .engine_call import Ask, EngineCall, Output, numbered
from .logprobs import ChatLogprobs, chat_logprobs
from .record import record_of
from .responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    FinishReason,
    finish_reason,
    timings_of,
    usage_of,
)
from .salt import salt_of
from .service import Served, Service
from .stream import EventStream


def chat_router(service: Service) -> APIRouter:
    """The route that continues conversations."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/chat/completions",
        response_model=None,
        responses={200: json_or_stream(ChatCompletion), **GENERATION_ERRORS},
    )
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer a conversation, through the model's chat template."""
        served = service.find(body.model)
        call = await _admit(service, served, body, request)
        writer = _Writer(call, served, body)
        if body.stream:
            return EventStream(call, writer, service.settings)
        try:
            return answer(writer.whole(await unless_disconnected(request, call.outputs())))
        finally:
            call.close()

    return router


async def _admit(service: Service, served: Served, body: ChatBody, request: Request) -> EngineCall:
    service.check_open()
    salt, longest = salt_of(body, caller_of(request.scope)), served.engine.max_model_len

    def prepare() -> list[Ask]:
        messages = [message.for_template() for message in body.messages]
        ids = served.model.tokenizer.apply_chat_template(messages)
        limit = max(1, longest - len(ids)) if body.token_limit is None else body.token_limit
        params = body.sampling(limit, body.scored)
        return [
            Ask(ids, numbered(params, number), body.priority or 0, salt)
            for number in range(body.choices)
        ]

    try:
        record = record_of(request.scope)
        return await EngineCall.admit(service, served, record, "chatcmpl", prepare)
    except RequestError as error:
        # The engine knows prompts; this client wrote messages.
        param = "messages" if error.param == "prompt" else error.param
        raise RequestError(error.message, param, error.code) from error


@dataclass(frozen=True)
class _Writer:
    """Writes one request's answer: whole, or as the `Chunks` of a stream."""

    call: EngineCall
    served: Served
    body: ChatBody
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, outputs: Sequence[Output]) -> ChatCompletion:
        """All choices at once."""
        ends = [output.end for output in outputs if output.end is not None]
        return ChatCompletion(
            id=self.call.id,
            object="chat.completion",
            created=self.created,
            model=self.served.name,
            choices=[self._choice(index, output) for index, output in enumerate(outputs)],
            usage=usage_of(ends, self.body.choices),
            timings=timings_of(ends),
        )

    def first(self, index: int) -> ChatChunk:
        """Who speaks."""
        return self._chunk(index, Delta(role="assistant", content=""))

    def event(self, index: int, event: Event) -> list[ChatChunk]:
        """More of a turn, or its end with its timings."""
        match event:
            case TextDelta(text=text, logprobs=scored) if text or scored:
                return [self._chunk(index, Delta(content=text), self._scores(scored))]
            case Finished():
                chunk = self._chunk(index, Delta(), reason=finish_reason(event))
                chunk.timings = timings_of([event])
                return [chunk]
        return []

    def usage(self, ends: Sequence[Finished]) -> ChatChunk | None:
        """Tokens of the request, if asked for."""
        if not self.body.include_usage:
            return None
        chunk = self._empty_chunk()
        chunk.usage = usage_of(ends, self.body.choices)
        return chunk

    def _choice(self, index: int, output: Output) -> ChatChoice:
        assert output.end is not None
        return ChatChoice(
            index=index,
            message=AssistantMessage(role="assistant", content=output.text, refusal=None),
            logprobs=self._scores(output.logprobs),
            finish_reason=finish_reason(output.end),
        )

    def _scores(self, scored: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if self.body.scored is None:
            return None
        return chat_logprobs(self.served.model.tokenizer, scored)

    def _chunk(
        self,
        index: int,
        delta: Delta,
        scores: ChatLogprobs | None = None,
        reason: FinishReason | None = None,
    ) -> ChatChunk:
        chunk = self._empty_chunk()
        chunk.choices.append(
            ChunkChoice(index=index, delta=delta, logprobs=scores, finish_reason=reason)
        )
        if self.body.include_usage:
            chunk.usage = None  # now it is set, and so is written
        return chunk

    def _empty_chunk(self) -> ChatChunk:
        return ChatChunk(
            id=self.call.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.served.name,
            choices=[],
        )
