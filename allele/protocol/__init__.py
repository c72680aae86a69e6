"""The only types that cross roles: commands, samples, probes, progress, and the errors all of them answer with."""
