"""Checkpoints that others quantised, read as they are: GPTQ, AWQ and compressed-tensors folders, and GGUF files.

Each format has a file of its own, which turns its tensors into `QuantisedTensor`s under the names of the
unquantised ones: to all other code a tensor in float32 whose values are exactly scale * (code - zero).
Routed experts can also be taken as codes and scales (`experts.py`), so that they go into a packed format
of this project without a second rounding.
"""
