"""Kernels for NVIDIA GPUs, in Gluon and Triton. Imported only where a GPU is asked for."""
