"""Triton kernels, one file per op; imported when an op first runs on the backend "triton"."""
