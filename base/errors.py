"""The root of the project's errors."""


class OnceoverError(Exception):
    """A failure that the user can mend. Its text is one line: what is wrong, and how to put it right.

    Each module derives its own class and raises it; the command line prints the text and leaves with
    ``exit_code`` (2: the call is wrong, 1: anything else). Any other exception is a bug and keeps its traceback.
    """

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]
