"""Every file of weights: Hugging Face, GGUF, GPTQ, AWQ and compressed-tensors in;
converted checkpoints out and in; export."""
