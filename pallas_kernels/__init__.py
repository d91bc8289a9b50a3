"""Pallas kernels: arrays in, arrays out. One folder per operation; imports jax alone."""
