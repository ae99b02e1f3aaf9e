"""Every file of weights: read, converted, written, exported.

Hugging Face, GGUF, GPTQ, AWQ and compressed-tensors in; converted checkpoints out and in; Hugging Face folders out.
"""
