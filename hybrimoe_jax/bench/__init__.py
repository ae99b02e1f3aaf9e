"""What `python -m hybrimoe_jax.bench` measures: contenders in processes of their own, measured in turns."""
