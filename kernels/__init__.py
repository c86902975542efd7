"""The weights' shapes and the arithmetic on them. Knows tensors, not models."""
