"""What ends a command with a message in place of a traceback."""


class CommandError(Exception):
    """The command cannot do what it was asked for; the message says why. Exit status 2."""
