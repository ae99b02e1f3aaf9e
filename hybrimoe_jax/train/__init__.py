"""Training the bundled model: corpus and its held-out works, tokenizer, grouped experts, loop, evaluation, export.

The order of the files is the order of the work: `corpus` (which works, in which editions, are seen at all), `tokens`
(bytes to ids and windows of ids), `experts` (the routed part at training speed), `loop` (objective, optimiser,
checkpoints), `evaluation` (loss per byte and what the router does) and `export` (a Hugging Face folder).
"""
