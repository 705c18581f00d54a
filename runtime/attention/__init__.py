"""Attention on a rank: kernels, blocks, the keys of other ranks."""
