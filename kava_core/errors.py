"""The one exception a person is meant to read."""


class KavaError(Exception):
    """Something the person at the keyboard can mend: settings, files, data, a foreign artefact.

    The message is one or two sentences: what was expected, what was found, what to do. The command
    line prints it without a traceback and exits with `status`.
    """

    status = 1


# Of torch's allocators, of malloc, and of threads that get no stack.
_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory",
           "can't start new thread")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is lacking, whoever's words these are."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY)
