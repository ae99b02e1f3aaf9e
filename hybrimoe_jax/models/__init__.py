"""Flax modules of the model families. Imports jax."""

if __name__ != "hybrimoe_jax.models":  # the link at the repository's root would load a second copy
    raise ImportError("import this package as hybrimoe_jax.models")
