"""The command line: one thin verb for each public function. Knows no tensors; loads torch late."""

from .verbs import app, main

__all__ = ["app", "main"]
