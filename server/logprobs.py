"""Log-probabilities in the two shapes that the OpenAI API has for them."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from ..runtime.request import TokenLogprob
from ..runtime.token_text import token_bytes, token_text
from ..runtime.tokenizer import Tokenizer

_MOST_BEFORE = 4  # tokens that a tokenizer puts before a text


class CompletionLogprobs(BaseModel):
    """Of completions: four lists of one entry a token; the first of a prompt has no figures."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A token that was likely, and the bytes it stands for."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A token that was written, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of chats."""

    content: list[ChatTokenLogprob]
    refusal: None


class LegacyLogprobs:
    """Writes those of one choice, piece by piece.

    An offset is the length of the text before a token, so special tokens that the text leaves out,
    and characters of several tokens, move none that come later.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, prompt_ids: Sequence[int]) -> None:
        """`skip_special` as in the text of the choice, which goes on from the prompt."""
        self._tokenizer, self._prompt_ids = tokenizer, prompt_ids
        self._text, self._offset = tokenizer.stream(skip_special, prompt_ids), 0

    def prompt(self, scored: Sequence[TokenLogprob], text: str) -> CompletionLogprobs:
        """Of the echoed prompt, whose first token was predicted by nothing; `text` is its own."""
        before = self._before(text)
        written, self._text = self._text, self._tokenizer.stream(skip_special=before is None)
        piece = self._piece(self._prompt_ids, [None, *scored], before or 0)
        self._text, self._offset = written, len(text)
        return piece

    def _before(self, text: str) -> int | None:
        """How many tokens were put before the prompt's own; None where that cannot be told."""
        ids = self._prompt_ids
        for count in range(_MOST_BEFORE + 1):
            if self._tokenizer.decode(ids[count:], special=True).startswith(text):
                return count
            if count == len(ids) or not self._tokenizer.is_control(ids[count]):
                break
        return None

    def written(self, scored: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """Of tokens that were written."""
        return self._piece([each.token_id for each in scored], scored)

    def _piece(
        self, ids: Sequence[int], scored: Sequence[TokenLogprob | None], silent: int = 0
    ) -> CompletionLogprobs:
        """The first `silent` ones have no text."""
        offsets = []
        for at, token in enumerate(ids):
            offsets.append(self._offset)
            self._offset += len(self._text.push(token)) if at >= silent else 0
        return CompletionLogprobs(
            tokens=[token_text(self._tokenizer, token) for token in ids],
            token_logprobs=[None if each is None else each.logprob for each in scored],
            top_logprobs=[None if each is None else self._top(each) for each in scored],
            text_offset=offsets,
        )

    def _top(self, scored: TokenLogprob) -> dict[str, float]:
        """The likeliest first; the token itself is always among them."""
        found: dict[str, float] = {}
        for token, logprob in (*scored.top, (scored.token_id, scored.logprob)):
            found.setdefault(token_text(self._tokenizer, token), logprob)
        return found


def joined(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Several pieces as one."""
    whole = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in pieces:
        whole.tokens += piece.tokens
        whole.token_logprobs += piece.token_logprobs
        whole.top_logprobs += piece.top_logprobs
        whole.text_offset += piece.text_offset
    return whole


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Of tokens that were written in a chat."""
    content = []
    for each in scored:
        top = [_top(tokenizer, token, logprob) for token, logprob in each.top]
        own = _top(tokenizer, each.token_id, each.logprob)
        content.append(ChatTokenLogprob(**own.model_dump(), top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def _top(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    return TopLogprob(
        token=token_text(tokenizer, token),
        logprob=logprob,
        bytes=list(token_bytes(tokenizer, token)),
    )
