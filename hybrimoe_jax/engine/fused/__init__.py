"""Decode steps as one program, where nothing is decided inside a step."""
