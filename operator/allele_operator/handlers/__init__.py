"""kopf as the event shell: it lists, watches and authenticates, and hands every event on."""
