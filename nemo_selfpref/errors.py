"""The exceptions a user can meet. Every message says what was wrong, what was found, what was
expected and how to put it right."""

EXIT_REFUSED = 2
"""Exit status after an error meant for people: running the same again would end the same way."""
EXIT_STOPPED = 75
"""Stopped on request with everything saved: the same command goes on (sysexits.h: EX_TEMPFAIL)."""
EXIT_HUNG = 76
"""A rank stood still for too long; the same command goes on from the newest checkpoint."""


class SelfPrefError(Exception):
    """Base of all errors raised on purpose; the command line prints them without a traceback and
    ends with `exit_status`."""

    exit_status = EXIT_REFUSED


class RunStopped(SelfPrefError):
    """A signal asked the run to stop, and all that was done is on disk."""

    exit_status = EXIT_STOPPED


class ConfigError(SelfPrefError, ValueError):
    """A configuration that cannot be run: unknown key, wrong type, contradiction."""


class DataError(SelfPrefError, ValueError):
    """A row, file, template or tokenizer that cannot be used. The message names file and line."""


class RolloutError(SelfPrefError, RuntimeError):
    """Generation failed: a teacher endpoint, an engine, or a sample that breaks the contract.

    `status`: with which HTTP status a server said so; None where none answered.
    """

    status: int | None = None


class RolloutTimeout(RolloutError):
    """An engine did not answer, or a wait did not end, within its deadline."""


class RolloutCancelled(RolloutError):
    """Whoever asked no longer wants the answer."""


class RolloutRefused(RolloutError):
    """A question that no engine of this kind can answer: the caller's mistake. Another engine would
    refuse it too. Nothing was sampled."""


class StaleWeightsError(RolloutError):
    """An engine holds other weights than those it was asked for. Nothing was sampled."""


class WeightSyncError(RolloutError):
    """New weights were refused or did not arrive whole; the message says what the engine holds
    now."""


class TrainingError(SelfPrefError, RuntimeError):
    """Training cannot go on: a loss that is not a number. The weights are as before the step."""


class CheckpointError(SelfPrefError, RuntimeError):
    """A checkpoint or Hugging Face folder that is incomplete, damaged or of another model."""
