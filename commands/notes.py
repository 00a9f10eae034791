"""What goes to stderr: notes, warnings as notes, and no progress bars where nobody watches."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Generator
from typing import TextIO

import click


def print_note(message: str) -> None:
    """A line on stderr, so that stdout holds the data alone."""
    click.echo(f"flowmm: {message}", err=True)


def calm_libraries() -> None:
    """Progress bars of the libraries only where somebody watches."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


@contextlib.contextmanager
def warnings_as_notes() -> Generator[None]:
    """What flowmm warns about, as one line on stderr; other libraries' warnings as they come."""
    from flowmm.runtime import FlowDriftWarning, NoCompilerWarning, PlanFitWarning

    ours = (FlowDriftWarning, NoCompilerWarning, PlanFitWarning)
    show = warnings.showwarning

    def show_note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ours):
            print_note(f"warning: {message}")
        else:
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        for category in ours:
            warnings.simplefilter("always", category)
        warnings.showwarning = show_note  # ty: ignore[invalid-assignment]
        yield
