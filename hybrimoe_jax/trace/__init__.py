"""Routing traces and timelines: their files, layouts of other programs, checks and figures. Imports no jax."""
