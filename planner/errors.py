"""The errors that users and scripts see, each with the exit code of the command."""

EXIT_OK = 0
EXIT_BAD_CONFIG = 2
EXIT_PREEMPTED = 75
EXIT_DO_NOT_REQUEUE = 93
EXIT_INFEASIBLE = 94
EXIT_NUMERIC = 95
EXIT_NO_CHECKPOINT = 96


class LonghaulError(Exception):
    """Base of every error with a message for users. ``exit_code``: the exit code of the command."""

    exit_code = 1


class SpecError(LonghaulError, ValueError):
    """A user's file, flag or argument is wrong. The text says what, where and how to fix it."""

    exit_code = EXIT_BAD_CONFIG


class InfeasibleError(LonghaulError):
    """No legal plan exists. ``binding`` names the limit that is exceeded; the bytes needed and available are per
    device."""

    exit_code = EXIT_INFEASIBLE

    def __init__(self, message: str, *, binding: str, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.binding = binding
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class PlanError(LonghaulError):
    """A plan breaks a rule of plans: a bug or a corrupted file, never a user's mistake."""


class PlanMismatchError(LonghaulError):
    """The ranks hold different plans for the same step. Lists the digests by rank."""


class NumericError(LonghaulError):
    """Loss or gradient norm is not finite; training stopped before the optimizer step."""

    exit_code = EXIT_NUMERIC


class CheckpointError(LonghaulError):
    """No checkpoint could be loaded, or the requested one does not fit this run."""

    exit_code = EXIT_NO_CHECKPOINT
