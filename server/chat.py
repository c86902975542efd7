"""POST /v1/chat/completions: a conversation in, the assistant's next turn out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import RequestError
from ..runtime.grammar import Grammar
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
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    finish_reason,
    timings_of,
    usage_of,
)
from .salt import salt_of
from .service import Served, Service
from .stream import EventStream
from .tool_parser import CallDelta, ToolCallParser, parse_calls
from .tool_parser import ToolCall as ParsedCall
from .tool_text import conversation
from .tools import ToolSet


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
        tools = body.tool_set
        writer = _Writer(call, served, body, tools is not None and bool(tools.offered))
        if body.stream:
            return EventStream(call, writer, service.settings)
        try:
            return answer(writer.whole(await unless_disconnected(request, call.outputs())))
        finally:
            call.close()

    return router


async def _admit(service: Service, served: Served, body: ChatBody, request: Request) -> EngineCall:
    service.check_open()
    salt, record = salt_of(body, caller_of(request.scope)), record_of(request.scope)
    try:
        admission = EngineCall.admit(
            service,
            served,
            record,
            "chatcmpl",
            lambda: _asks(served, body, salt),
            compiles=body.has_form,
        )
        return await unless_disconnected(request, admission)
    except RequestError as error:
        # The engine knows prompts; this client wrote messages.
        param = "messages" if error.param == "prompt" else error.param
        raise RequestError(error.message, param, error.code) from error


def _asks(served: Served, body: ChatBody, salt: bytes) -> list[Ask]:
    """What the engine is asked: the conversation's tokens, and what an answer must look like."""
    tools, tokenizer = body.tool_set, served.model.tokenizer
    messages, shown = conversation(
        [message.for_template() for message in body.messages],
        [] if tools is None else tools.described(),
        tokenizer.chat_template,
    )
    ids = tokenizer.apply_chat_template(
        messages,
        body.add_generation_prompt is not False,
        shown,
        body.chat_template_kwargs,
        bool(body.continue_final_message),
    )
    rest = max(1, served.engine.max_model_len - len(ids))
    params = body.sampling(rest if body.token_limit is None else body.token_limit, body.scored)
    grammar = _grammar(served, body, tools)
    return [
        Ask(
            ids,
            numbered(params, number),
            body.priority or 0,
            salt,
            None if grammar is None else grammar.constraint(),
            goes_on=bool(body.continue_final_message),
        )
        for number in range(body.choices)
    ]


def _grammar(served: Served, body: ChatBody, tools: ToolSet | None) -> Grammar | None:
    if tools is not None and tools.offered:
        return tools.grammar(served.grammars)
    return None if body.response_format is None else body.response_format.grammar(served.grammars)


@dataclass(frozen=True)
class _Writer:
    """Writes one request's answer: whole, or as the `Chunks` of a stream."""

    call: EngineCall
    served: Served
    body: ChatBody
    offers_tools: bool
    created: int = field(default_factory=lambda: int(time.time()))
    parsers: dict[int, ToolCallParser] = field(default_factory=dict)

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
                deltas = self._deltas(index, text)
                scores = self._scores(scored)
                # All that was scored goes with the first piece, if there is one.
                first, *more = deltas or [Delta()]
                chunks = [self._chunk(index, first, scores)] if deltas or scores else []
                return chunks + [self._chunk(index, delta) for delta in more]
            case Finished():
                chunks = [self._chunk(index, delta) for delta in self._deltas(index, None)]
                chunks.append(self._chunk(index, Delta(), reason=self._reason(index, event)))
                chunks[-1].timings = timings_of([event])
                return chunks
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
        content: str | None = output.text
        calls: list[ParsedCall] = []
        whole = False
        if self.offers_tools:
            content, calls, whole = parse_calls(output.text)
        message = AssistantMessage(role="assistant", content=content, refusal=None)
        if calls:
            message.content = content or None
            message.tool_calls = [_written(call) for call in calls]
        called = bool(calls) and whole and output.end.reason == "stop"
        return ChatChoice(
            index=index,
            message=message,
            logprobs=self._scores(output.logprobs),
            finish_reason="tool_calls" if called else finish_reason(output.end),
        )

    def _deltas(self, index: int, text: str | None) -> list[Delta]:
        """What more text of a turn brings, None for its end: content, or pieces of calls."""
        if not self.offers_tools:
            return [Delta(content=text)] if text else []
        parser = self.parsers.setdefault(index, ToolCallParser())
        pieces = parser.finish() if text is None else parser.push(text)
        return [Delta(content=p) if isinstance(p, str) else _call_delta(p) for p in pieces]

    def _reason(self, index: int, end: Finished) -> FinishReason:
        parser = self.parsers.get(index)
        called = parser is not None and parser.has_whole_calls and end.reason == "stop"
        return "tool_calls" if called else finish_reason(end)

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


def _written(call: ParsedCall) -> ToolCall:
    function = FunctionCall(name=call.name, arguments=call.arguments)
    return ToolCall(id=call.id, type="function", function=function)


def _call_delta(delta: CallDelta) -> Delta:
    """The id, type and name come once, with the first piece."""
    if delta.name is None:
        piece = ToolCallDelta(index=delta.index, function=FunctionDelta(arguments=delta.arguments))
        return Delta(tool_calls=[piece])
    function = FunctionDelta(name=delta.name, arguments=delta.arguments)
    first = ToolCallDelta(index=delta.index, id=delta.id, type="function", function=function)
    return Delta(tool_calls=[first])
