"""The paper's experiments, side by side with its numbers."""
