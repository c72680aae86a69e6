"""The `allele` command and kubectl plugin: local mode, catalogue, evaluation, plots."""
