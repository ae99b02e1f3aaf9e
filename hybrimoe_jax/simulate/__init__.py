"""The simulator: routing traces replayed on the machine of a profile, by the planner that the live engine runs.

`workload` (a trace as steps), `replay` (planner and virtual machine over a workload), `records` (what is reported),
`grid` (many runs at once). Imports no jax.
"""
