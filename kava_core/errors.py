"""The one exception a person is meant to read."""


class KavaError(Exception):
    """Something the person at the keyboard can mend: settings, files, data, a foreign artefact.

    The message is one or two sentences: what was expected, what was found, what to do. The command
    line prints it without a traceback and exits with status 1.
    """
