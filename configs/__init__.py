"""What every stage shares: the settings and the root of the error classes. Imports nothing of the project."""


class OnceoverError(Exception):
    """A failure the user can mend. Its text is one line: what is wrong, and how to put it right.

    Each module derives its own class and raises it; the command line prints the text and leaves with
    ``exit_code`` (2: the call is wrong, 1: anything else). Any other exception is a bug and keeps its traceback.
    """

    exit_code = 1
