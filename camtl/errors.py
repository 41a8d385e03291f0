"""Errors that end a command with one clear line.

Ops raise plain :class:`ValueError` / :class:`TypeError`; everything a person can mend in a command, a config
or a data file raises :class:`UsageError`. Both kinds carry the exit code that the command line returns.
"""

from __future__ import annotations


class CamtlError(Exception):
    """A run that failed for a reason we can name. ``exit_code`` is 1."""

    exit_code = 1


class UsageError(CamtlError, ValueError):
    """A command, config or data file that cannot be used as given. ``exit_code`` is 2."""

    exit_code = 2
