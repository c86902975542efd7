"""What clients may ask of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag

from ..errors import RequestError
from ..runtime.params import MAX_LOGPROBS, SamplingParams
from .protocol import MAX_CHOICES, MAX_INT, NEUTRAL, GenerationBody, TokenId

_MAX_PROMPTS = 1024  # whatever the operator allows, so that reading a body stays quick
_MAX_TOKENS = 16  # of OpenAI, where none are given


def _prompt_shape(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "<id lists>"
    return "<texts>" if isinstance(first, str) else "<ids>"


Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[
        list[Text], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True), Tag("<texts>")
    ]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[
        list[TokenIds],
        Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True),
        Tag("<id lists>"),
    ],
    Discriminator(_prompt_shape),
]


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt = Field(description="One text, several, the tokens of one, or of several.")
    echo: bool | None = Field(None, description="Begin the answer with its prompt.")
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="0 only with echo.")
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="Answers of which the n likeliest are given."
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = Field(
        None, description="True unless given: what the model puts around a text."
    )
    suffix: Annotated[Literal[""] | None, NEUTRAL] = None

    @property
    def candidates(self) -> int:
        """Answers to each prompt that are written."""
        return self.best_of or self.choices

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt by itself: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str | list[int]], self.prompt)

    @property
    def params(self) -> SamplingParams:
        """The engine's parameters.

        Raises:
            RequestError: the fields contradict each other.
        """
        limit = _MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if limit == 0 and not self.echo:
            raise RequestError("max_tokens: 0 is only allowed with echo", "max_tokens")
        if self.candidates < self.choices:
            raise RequestError("best_of: it is less than n", "best_of")
        ranked = self.candidates > self.choices
        if ranked and self.stream:
            raise RequestError("best_of: the best are only known at the end of a stream", "best_of")
        return self.sampling(
            limit,
            0 if ranked and self.logprobs is None else self.logprobs,
            self.logprobs if self.echo else None,
        )
