"""What an adapter is: resources, wire types, byte format, store, residency. Imports no torch, kopf or kubernetes."""

__version__ = "0.1.0"
