"""The error of a user's mistake: the command line prints its one message and exits 2."""


class UserError(ValueError):
    """Something the user asked for cannot be: the message names it, what it was and what it must be."""
