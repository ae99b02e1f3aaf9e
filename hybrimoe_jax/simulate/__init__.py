"""The simulator: routing traces replayed on the machine of a profile, by the planner that the live engine runs. Imports no jax.

`profile` (what a machine takes), `shapes` (what a model asks for), `machine` (the lanes under a virtual clock), `workload` (a trace as
steps), `replay` (planner and machine over a workload), `records` (what is reported), `grid` (many runs at once).
"""
