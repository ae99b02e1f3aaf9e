"""Running a model: load, engine, generation, statistics. Only its `steps`, `fused` and `lanes` have effects on devices and threads."""
