"""The command `gq-triton`: its sub-commands, and errors as one line."""

from __future__ import annotations

import click

import gq_triton
from gq_triton.speech.download import DownloadError

from .allocate import allocate
from .data import data
from .info import info
from .quickstart import quickstart
from .reproduce import reproduce
from .train import qat, train
from .tune import tune
from .use import convert, evaluate, report, transcribe

__all__ = ["main"]

ERRORS = (ValueError, OSError, ModuleNotFoundError, FloatingPointError, DownloadError)


class OneLineErrors(click.Group):
    """Shows errors that a user can mend as one line; `--traceback` shows where they came from."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ERRORS as error:
            if ctx.params["traceback"]:
                raise
            raise click.ClickException(str(error)) from error


@click.group(
    name="gq-triton", cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(gq_triton.__version__, prog_name="gq-triton")
@click.option("--traceback", is_flag=True, help="show where an error came from")
def main(traceback: bool) -> None:
    """General Quantizer: train, quantize and use speech recognizers with weights of 1 to 8 bits."""


for command in (quickstart, train, allocate, qat, evaluate, convert, transcribe, report, data, reproduce, info, tune):
    main.add_command(command)
