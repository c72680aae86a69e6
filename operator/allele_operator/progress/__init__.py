"""Progress pushed by drivers: who may report, the newest report of each run, and the HTTP endpoint that takes them."""
