"""Checkpoint in, tokens out. Knows models and requests, not HTTP."""
