"""POST /v1/completions: prompts in, their continuations out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import RequestError
from ..runtime.request import Event, Finished, PromptScored, TextDelta, TokenLogprob
from ..runtime.tokenizer import Tokenizer
from .auth import caller_of
from .body import JsonRoute
from .completion_body import CompletionBody
from .disconnect import unless_disconnected
from .documents import GENERATION_ERRORS, answer, json_or_stream
from .engine_call import Ask, EngineCall, Output, numbered
from .logprobs import CompletionLogprobs, LegacyLogprobs, joined
from .record import record_of
from .responses import Completion, CompletionChoice, finish_reason, timings_of, usage_of
from .salt import salt_of
from .service import Served, Service
from .stream import EventStream


def completions_router(service: Service) -> APIRouter:
    """The route that continues prompts."""
    router = APIRouter(route_class=JsonRoute)

    @router.post(
        "/completions",
        response_model=None,
        responses={200: json_or_stream(Completion), **GENERATION_ERRORS},
    )
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Continue one or several prompts; n choices for each, in their order."""
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


async def _admit(
    service: Service, served: Served, body: CompletionBody, request: Request
) -> EngineCall:
    service.check_open()
    prompts, most = body.prompts, service.settings.max_prompts
    if len(prompts) > most:
        raise RequestError(f"prompt: {len(prompts)} are given, at most {most}", "prompt")
    params, salt = body.params, salt_of(body, caller_of(request.scope))
    special = body.add_special_tokens is not False
    encode = served.model.tokenizer.encode

    def prepare() -> list[Ask]:
        known = [encode(each, special) if isinstance(each, str) else each for each in prompts]
        return [
            Ask(ids, numbered(params, number), body.priority or 0, salt, goes_on=True)
            for ids in known
            for number in range(body.candidates)
        ]

    return await EngineCall.admit(service, served, record_of(request.scope), "cmpl", prepare)


@dataclass(frozen=True)
class _Writer:
    """Writes one request's answer: whole, or as the `Chunks` of a stream."""

    call: EngineCall
    served: Served
    body: CompletionBody
    created: int = field(default_factory=lambda: int(time.time()))
    scores: dict[int, LegacyLogprobs] = field(default_factory=dict)

    def whole(self, outputs: Sequence[Output]) -> Completion:
        """All choices at once, of each prompt the likeliest if more were written."""
        ends = [output.end for output in outputs if output.end is not None]
        kept = [
            at
            for first in range(0, len(outputs), self.body.candidates)
            for at in self._best(outputs, range(first, first + self.body.candidates))
        ]
        completion = self._completion(
            [self._whole_choice(number, at, outputs[at]) for number, at in enumerate(kept)]
        )
        completion.usage = usage_of(ends, self.body.candidates)
        completion.timings = timings_of(ends)
        return completion

    def first(self, index: int) -> Completion | None:
        """The prompt, if it is echoed and need not be scored first."""
        if not self.body.echo or self.body.logprobs is not None:
            return None
        return self._chunk(_choice(index, self._prompt_text(index)))

    def event(self, index: int, event: Event) -> list[Completion]:
        """More of a choice, or its end with its timings."""
        match event:
            case PromptScored(scored):
                text = self._prompt_text(index)
                scores = self._scores(index).prompt(scored, text)
                return [self._chunk(_choice(index, text, scores))]
            case TextDelta(text=text, logprobs=scored) if text or scored:
                return [self._chunk(_choice(index, text, self._written(index, scored)))]
            case Finished():
                chunk = self._chunk(_choice(index, "", None, event))
                chunk.timings = timings_of([event])
                return [chunk]
        return []

    def usage(self, ends: Sequence[Finished]) -> Completion | None:
        """Tokens of all choices, if asked for."""
        if not self.body.include_usage:
            return None
        chunk = self._completion([])
        chunk.usage = usage_of(ends, self.body.candidates)
        return chunk

    def _best(self, outputs: Sequence[Output], of: range) -> list[int]:
        """Those of one prompt's answers that are given: the highest mean log-probability first."""
        if len(of) == self.body.choices:
            return list(of)
        return sorted(of, key=lambda at: _mean_logprob(outputs[at]), reverse=True)[
            : self.body.choices
        ]

    def _whole_choice(self, number: int, at: int, output: Output) -> CompletionChoice:
        prompt = self._prompt_text(at) if self.body.echo else ""
        pieces = []
        if self.body.echo and self.body.logprobs is not None:
            pieces.append(self._scores(at).prompt(output.prompt_logprobs, prompt))
        if self.body.logprobs is not None:
            pieces.append(self._scores(at).written(output.logprobs))
        scores = joined(pieces) if pieces else None
        return _choice(number, prompt + output.text, scores, output.end)

    def _written(self, index: int, scored: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        return None if self.body.logprobs is None else self._scores(index).written(scored)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.served.model.tokenizer

    def _scores(self, index: int) -> LegacyLogprobs:
        skip_special = self.body.skip_special_tokens is not False
        before = self.call.asks[index].prompt_ids
        return self.scores.setdefault(index, LegacyLogprobs(self._tokenizer, skip_special, before))

    def _prompt_text(self, index: int) -> str:
        prompt = self.body.prompts[index // self.body.candidates]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, special=True)

    def _chunk(self, choice: CompletionChoice) -> Completion:
        chunk = self._completion([choice])
        if self.body.include_usage:
            chunk.usage = None  # now it is set, and so is written
        return chunk

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.call.id,
            object="text_completion",
            created=self.created,
            model=self.served.name,
            choices=choices,
        )


def _choice(
    index: int,
    text: str,
    logprobs: CompletionLogprobs | None = None,
    end: Finished | None = None,
) -> CompletionChoice:
    reason = None if end is None else finish_reason(end)
    return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)


def _mean_logprob(output: Output) -> float:
    scores = [each.logprob for each in output.logprobs]
    return sum(scores) / len(scores) if scores else float("-inf")
