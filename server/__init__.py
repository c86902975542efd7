"""Tokens out over HTTP. Knows requests, not tensors."""
