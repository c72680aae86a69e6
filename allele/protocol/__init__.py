"""The only types that cross roles: trainer commands, samples, probes, progress, and the errors all of them answer with."""
