"""Measurements that can be believed: kernels, models, and endpoints under load."""
