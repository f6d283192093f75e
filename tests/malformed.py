"""For tests of files that may be damaged."""

from contextlib import contextmanager


@contextmanager
def may_be_refused(path):
    """Lets what is tried within fail, with a ValueError that names the file and nothing else."""
    try:
        yield
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"the error does not name {path}") from error
