"""The driver: one CPU process per run, which holds the algorithm and the environment and is the only committer."""
