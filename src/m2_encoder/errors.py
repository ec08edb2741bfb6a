"""Errors that a user can cause and mend.

Everything that a user controls (a configuration value, a file, an argument) fails with one of these: one message that
names what was given, what is allowed and how to mend it. Commands print the message without a traceback and exit 2.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used; the message names the value, the rule and the fix."""


class CheckpointError(UserError):
    """A checkpoint that is foreign, truncated, unsafe, or does not match the model."""


class NotGivenError(UserError):
    """Something that code hands over, such as a teacher, was not handed over yet."""


class ImageError(UserError):
    """An image that cannot be decoded; the message names the file and the reason."""
