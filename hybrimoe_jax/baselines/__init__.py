"""An offload engine in PyTorch to compare with: the same checkpoints, policies and statistics. Starts no jax."""
