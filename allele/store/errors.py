"""What can go wrong with a store, each as a type that a caller handles differently."""

from __future__ import annotations


class StoreError(Exception):
    """Base of this package's errors."""


class StoreUnavailable(StoreError):
    """The store did not answer after retries with backoff: try again later; nothing is known to have been lost."""


class StoreRefused(StoreError):
    """Credentials or permissions are wrong: retrying does not help."""


class ObjectNotFound(StoreError):
    """No such object."""


class AlreadyExists(StoreError):
    """A create-only write found an object there."""


class OwnershipError(StoreError):
    """The population's folder belongs to another population, base or shape."""


class FencedError(StoreError):
    """A newer writer of the same run has started: this one must stop, nothing of it was committed."""


class BaseMismatch(StoreError):
    """Files of a base model are not those of its manifest, or the manifest is of another base than asked for."""


class InvalidFact(StoreError):
    """A fact lacks what its kind needs; nothing of the commit was written."""
