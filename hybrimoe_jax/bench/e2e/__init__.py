"""`bench e2e`: whole runs of our systems beside PyTorch's offload engine and other libraries.

`grid` says what is compared, `rounds` measures it, `floor` says what theory allows, `bars` and `table` what came out.
"""
