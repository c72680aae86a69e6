"""Decisions of the operator as functions of values: (object, world, now) → actions, status, events.

Nothing here does I/O, reads a clock or imports kopf or kubernetes. `allele_operator.planning.plan` has the two entry
points, `plan` and `dependents`; `observe.project` makes the slim objects they read; `model` holds the types that the
shell and the plans share. The command line uses the same renderer for local mode.
"""
