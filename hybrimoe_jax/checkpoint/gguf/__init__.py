"""GGUF files: their metadata as a configuration, their tensors as weights."""
