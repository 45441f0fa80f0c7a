"""Errors a user can mend: one line each, exit code 2."""


class CompressError(Exception):
    """Base of every error that is the input's fault, not the program's.

    The message is one line: where, what came, what is needed, what to do.
    """


class RecipeError(CompressError):
    """A recipe, flag or method option that does not make sense."""


class PatternError(RecipeError):
    """A sparsity pattern that cannot be parsed or does not fit a weight."""


class CalibrationError(CompressError):
    """Text that is missing or too short, or activations that are not finite."""


class UnsupportedModelError(CompressError):
    """A model whose decoder blocks or linears cannot be handled."""


class FormatError(CompressError):
    """A checkpoint that is missing, truncated, inconsistent or not ours to overwrite."""


class BackendUnavailableError(CompressError):
    """A kernel backend that was asked for by name and cannot run here."""


class RunError(CompressError):
    """A run folder that holds something else, or a different recipe."""


class OutOfMemoryError(RunError):
    """Memory that does not do even for the smallest batch; what was finished stays."""


class TrainingError(CompressError):
    """Training that diverged or whose loss is not finite; what it had saved stays."""


class RankError(RunError):
    """Another process of the same launch failed; the message is its own."""
