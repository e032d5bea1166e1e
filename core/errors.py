"""Every refusal and failure that a user may see, with its stable code.

AppError
├── InvalidSpec            422  the request itself is wrong
│   ├── UnsupportedOption  422  understood, but this version cannot do it
│   └── ForbiddenPath      422  a path outside the allowed roots
├── IncompatiblePlan       422  the split does not fit the model or the cluster
├── InvalidModel           422  a model folder that is not what it says
│   └── UnknownWeights     422  weights that no rule, or two rules, match; or that are missing
├── InvalidDataset         422
│   └── UnreadableMedia    422  core.data.media
├── CorruptCheckpoint      422
├── Unauthenticated        401
├── Forbidden              403
├── NotFound               404
├── Conflict               409
│   ├── InvalidTransition  409  the job's state does not allow it
│   └── OverLimit          409  more than one user may have at once
├── TooLarge               413
├── OffsetMismatch         409  an upload chunk that does not start where the upload ends
├── RangeNotSatisfiable    416
├── DigestMismatch         422
├── UnsafeArchive          422
├── NonFiniteLoss          500
├── DecoderDied            500  core.data.decoding
├── RunnerCrashed          500  the process died without saying why
├── AttemptLost            500  the host or its supervisor vanished
├── DependencyFailed       409
├── Unavailable            503
└── DiskFull               507
"""

from __future__ import annotations


class AppError(Exception):
    """A refusal or failure with a stable `code`; `message` names field and value, `hint` says what would work."""

    code = "internal_error"
    status = 500
    hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if hint is not None:
            self.hint = hint
        if code is not None:
            self.code = code


class InvalidSpec(AppError):
    """The request is malformed or contradicts itself."""

    code, status = "invalid_spec", 422


class UnsupportedOption(InvalidSpec):
    """The option is known but would have no effect or cannot be done by this version."""

    code = "unsupported_option"


class ForbiddenPath(InvalidSpec):
    """The path does not lie under an allow-listed root."""

    code = "forbidden_path"


class IncompatiblePlan(AppError):
    """The requested split does not fit the model or the cluster."""

    code, status = "incompatible_plan", 422


class InvalidModel(AppError):
    """A model folder whose config or weights are not what they should be."""

    code, status = "invalid_model", 422


class UnknownWeights(InvalidModel):
    """Weights that no mapping rule matches, that two match, or that are missing."""

    code = "unknown_weights"


class InvalidDataset(AppError):
    """A data set that cannot be read or has nothing to train on."""

    code, status = "invalid_dataset", 422


class CorruptCheckpoint(AppError):
    """A checkpoint with missing, truncated or contradictory files."""

    code, status = "corrupt_checkpoint", 422


class Unauthenticated(AppError):
    """No valid API key came with the request."""

    code, status = "unauthenticated", 401


class Forbidden(AppError):
    """The key's role does not allow it."""

    code, status = "forbidden", 403


class NotFound(AppError):
    """No such thing, or it is not yours."""

    code, status = "not_found", 404


class Conflict(AppError):
    """The state of the resource does not allow it."""

    code, status = "conflict", 409


class InvalidTransition(Conflict):
    """The job's state does not allow the change."""

    code = "invalid_transition"


class OverLimit(Conflict):
    """The user has as many unfinished jobs as one user may."""

    code = "over_limit"


class OffsetMismatch(Conflict):
    """An upload chunk that does not start where the upload ends."""

    code = "offset_mismatch"


class DependencyFailed(Conflict):
    """A job that this one waits for did not succeed."""

    code = "dependency_failed"


class TooLarge(AppError):
    """Larger than the configured limit."""

    code, status = "too_large", 413


class RangeNotSatisfiable(AppError):
    """The byte range lies outside the file."""

    code, status = "range_not_satisfiable", 416


class DigestMismatch(AppError):
    """The content's SHA-256 is not the announced one."""

    code, status = "digest_mismatch", 422


class UnsafeArchive(AppError):
    """An archive with an entry that could escape its folder or exhaust the disk."""

    code, status = "unsafe_archive", 422


class NonFiniteLoss(AppError):
    """The loss or gradient stayed NaN or infinite past the limit."""

    code, status = "non_finite_loss", 500


class RunnerCrashed(AppError):
    """The runner process ended without reporting why."""

    code, status = "runner_crashed", 500


class AttemptLost(AppError):
    """The host or the supervisor of the attempt vanished and its lease ran out."""

    code, status = "attempt_lost", 500


class Unavailable(AppError):
    """A part of the service does not answer at the moment."""

    code, status = "unavailable", 503


class DiskFull(AppError):
    """Not enough free space for what would be written."""

    code, status = "disk_full", 507
