"""Every error `tcaq` raises on purpose. A message says what was given, what is allowed, where, and what to do."""

from __future__ import annotations


class TcaqError(Exception):
    """Base of all errors raised on purpose; the command line turns them into one line and exit code 1."""


class UsageError(TcaqError, ValueError):
    """An argument, option or recipe field is outside what is allowed (exit code 2 on the command line)."""


class PlanError(UsageError):
    """A plan rule matches no layer, a layer matches no rule, or a rule asks for what the layer cannot do."""


class ModelError(TcaqError):
    """The model cannot be found, cannot be loaded, or has no denoiser."""


class NumericalError(TcaqError):
    """NaN or infinity in weights or activations; the message names the layer and, where known, the step."""


class RunError(TcaqError):
    """A run directory belongs to another run, is damaged, or cannot be written."""


class CheckpointError(TcaqError):
    """A checkpoint is damaged, incomplete, or was written by a newer format."""


class DataError(TcaqError):
    """A data set is missing or is not what its format promises."""


class MissingExtraError(TcaqError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package!r} is not installed. Install it with: pip install 'tcaq[{extra}]'")
