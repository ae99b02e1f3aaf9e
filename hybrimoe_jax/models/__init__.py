"""Flax modules of the model families. Imports jax."""

if __name__ != "hybrimoe_jax.models":  # the link at the repository's root would load a second copy
    raise ImportError("import this package as hybrimoe_jax.models")

import os
import tempfile

try:
    tempfile.gettempdir()
except OSError:  # chex asks for a folder of temporary files when it is imported, and writes none: a disk may be full
    tempfile.tempdir = os.curdir
    import chex  # noqa: F401

    tempfile.tempdir = None
