"""Reports pushed by drivers and gateways: who may report, the newest of each, and the HTTP endpoints that take them."""
