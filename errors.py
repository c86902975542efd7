"""The one error hierarchy of halfweave.

Every message says what is wrong and where; `hint` says what to type or change next. The command
line prints both and exits with `exit_code`; the server maps classes to HTTP statuses.
"""

from __future__ import annotations


class HalfweaveError(Exception):
    """Base of every error that halfweave raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HalfweaveError):
    """The call itself is wrong: a missing path, a bad option, an unusable calibration text."""

    exit_code = 2


class RefusedError(HalfweaveError):
    """The call is understood but must not be carried out: an unsafe file, a taken output."""

    exit_code = 3


class UnsupportedModel(RefusedError):  # noqa: N818 - names the condition, as the field does
    """The architecture, or an option of it, is not in the closed table of known ones."""


class CheckpointError(HalfweaveError):
    """A file of a model directory is missing, damaged, or contradicts another one."""


class CapacityError(HalfweaveError):
    """There is no room: memory, disk, or the waiting queue."""

    exit_code = 3


class NoProcessError(CapacityError):
    """A process could not be started: memory, processes or open files ran out."""


class RequestError(UsageError):
    """One generation request asks for something impossible.

    `param` names the offending field and `code` is the OpenAI error code, where there is one.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.param = param
        self.code = code


class EngineDeadError(HalfweaveError):
    """The engine's thread has stopped; nothing submitted to it will ever be answered."""


class NotNumbersError(HalfweaveError):
    """A model computed NaN or infinity where a number was needed."""
