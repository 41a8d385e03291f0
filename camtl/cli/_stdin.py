"""Lines of standard input as they come, for what must be answered before the next line is written."""

from __future__ import annotations

import codecs
import io
import os
import select
import stat
from collections.abc import Iterator
from typing import TextIO

_READ = 1 << 16


def comes_slowly(file: TextIO) -> bool:
    """Whether a line may have to be waited for: it is a pipe, a socket or a terminal, not a file."""
    try:
        mode = os.fstat(file.fileno()).st_mode
    except (OSError, ValueError):  # text in memory has no descriptor, what is closed no state
        return False
    return not stat.S_ISREG(mode)


def arriving(file: TextIO) -> Iterator[str | None]:
    """The lines of a pipe, without their ends; None wherever the next one is not there to be read yet.

    Reads the descriptor itself: nothing may have been read through ``file`` before, or be afterwards.
    """
    descriptor = file.fileno()
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder(file.encoding)(file.errors or "strict"), translate=True
    )
    rest = ""
    while True:
        if not _is_there(descriptor):
            yield None
        data = os.read(descriptor, _READ)
        *lines, rest = (rest + decoder.decode(data, final=not data)).split("\n")
        yield from lines
        if not data:
            if rest:
                yield rest
            return


def _is_there(descriptor: int) -> bool:
    """Whether a read would not wait."""
    try:
        return bool(select.select([descriptor], [], [], 0)[0])
    except OSError:  # a system that cannot say so of pipes: then what has come is answered at once
        return False
