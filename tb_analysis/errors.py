"""What can be wrong with the input of the analysis. Each message says what, where and what to do."""


class AnalysisError(Exception):
    """The comparison cannot be made at all (exit code 2), as opposed to made and failed (exit code 1)."""


class NoRunsError(AnalysisError):
    """No run was found where runs were expected."""


class MissingKeyError(AnalysisError):
    """A run's event files do not hold the asked-for scalar."""


class RunFileError(AnalysisError):
    """A run.json or CSV file beside a run cannot be understood."""


class RolesError(AnalysisError):
    """It cannot be told which run is the Source of which Target."""
