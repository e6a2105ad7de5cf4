"""The error of a user's mistake, whose one message the command line prints before it exits 2; errors in a line."""


class UserError(ValueError):
    """Something the user asked for cannot be: the message names it, what it was and what it must be."""


def in_a_line(error: Exception) -> str:
    """What happened, for a message; an OSError says it itself, others need their name."""
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())
