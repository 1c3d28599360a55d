"""Bad input: the exception's message names the field or file, the value it had, and what to do."""


class InputError(ValueError):
    """A configuration, file, checkpoint or argument that cannot be used. `train.py` prints it and exits with 2."""
