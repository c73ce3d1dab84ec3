"""The one error the command line turns into a line on stderr and exit status 2."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what was expected and what came."""
