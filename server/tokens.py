"""POST /tokenize and /detokenize: what a model's tokenizer makes of a text, and back."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import Response

from ..errors import RequestError
from ..runtime.token_text import token_text
from .body import JsonRoute
from .documents import GENERATION_ERRORS, answer
from .protocol import Body, TokenId
from .responses import Detokenized, Tokens
from .service import Served, Service


class TokenizeBody(Body):
    """A text, as a completion would read it."""

    model: str = Field(min_length=1, max_length=512)
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Tokens of a model."""

    model: str = Field(min_length=1, max_length=512)
    tokens: list[TokenId] = Field(fail_fast=True)


def tokens_router(service: Service) -> APIRouter:
    """The routes that ask a tokenizer and no model."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize", response_model=Tokens, responses=GENERATION_ERRORS)
    async def tokenize(body: TokenizeBody) -> Response:
        """The tokens of a text."""
        served = service.find(body.model)
        return answer(await run_in_threadpool(_tokens, served, body))

    @router.post("/detokenize", response_model=Detokenized, responses=GENERATION_ERRORS)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of tokens, special ones included."""
        served = service.find(body.model)
        return answer(await run_in_threadpool(_text, served, body.tokens))

    return router


def _tokens(served: Served, body: TokenizeBody) -> Tokens:
    tokenizer = served.model.tokenizer
    ids = tokenizer.encode(body.prompt, body.add_special_tokens)
    tokens = Tokens(count=len(ids), max_model_len=served.engine.max_model_len, tokens=ids)
    if body.return_token_strs:
        tokens.token_strs = [token_text(tokenizer, token) for token in ids]
    return tokens


def _text(served: Served, tokens: Sequence[int]) -> Detokenized:
    tokenizer = served.model.tokenizer
    outside = [token for token in tokens if tokenizer.piece(token) is None]
    if outside:
        raise RequestError(f"tokens: {outside[0]} is no token of the model", "tokens")
    return Detokenized(prompt=tokenizer.decode(tokens, special=True))
