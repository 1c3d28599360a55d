"""The one exception for bad input, for all of the trainer; the checkpoints' formats, which are mpt's, raise it too."""

from mpt.errors import InputError

__all__ = ["InputError"]
