"""Errors a user can cause, each with the exit code the command line reports (README, "Exit codes").

A message says what was found, what was expected and what to do next.
"""

from __future__ import annotations


class FlowmmError(Exception):
    """Base of every error flowmm raises on purpose. Exit code 4: the run failed."""

    exit_code = 4


class DriftError(FlowmmError):
    """A measured value left the plan: the result of a gate, not a failure of the program."""

    exit_code = 1


class InputError(FlowmmError):
    """An argument, prompt, image or data file cannot be used as given."""

    exit_code = 2


class BudgetError(InputError):
    """The asked number of KV entries cannot be met exactly."""


class PlanFormatError(InputError):
    """A plan file is damaged or does not follow ``plans/FORMAT.md``."""


class PlanVersionError(FlowmmError):
    """A plan was written in a schema version this flowmm cannot read."""

    exit_code = 3


class PlanMismatchError(FlowmmError):
    """A plan is valid but was made for another model."""

    exit_code = 3


class UnsupportedModelError(FlowmmError):
    """The model's architecture, or a library version, is not one flowmm can compress."""

    exit_code = 3


class ModelLoadError(FlowmmError):
    """Weights or processor files could not be loaded."""


class ContextFormatError(InputError):
    """A saved context is damaged, cut short, or not one."""


class ContextMismatchError(FlowmmError):
    """A saved context is valid but was made by another model, or for another plan or method."""

    exit_code = 3
