"""Weight formats: their names, the layout of their bytes, packing and sizes. Imports no jax."""
