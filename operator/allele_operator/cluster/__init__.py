"""The Kubernetes API as the operator uses it: a transport with a fence, a handful of verbs, events, a lease."""
