"""The engine: loading, generation, steps as the planner has them, statistics and warm-up."""
