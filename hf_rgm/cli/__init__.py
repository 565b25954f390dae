"""The `hf-rgm` command: one module per group of subcommands. Heavy imports happen when a command runs."""

import typer

from hf_rgm.cli import attribute, demo, distill, explore, sharing, validate

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """
    Training-data attribution for Hugging Face models.

    Exit status: 0 on success, 1 on an error, 2 for a wrong command line, 130 after Ctrl-C (0 for `explore`).
    HF_RGM_DEBUG=1 in the environment shows the traceback of an error.
    """


for command in (
    demo.demo, distill.distill, attribute.attribute, validate.validate,
    explore.explore, sharing.info, sharing.push, sharing.pull,
):  # fmt: skip
    app.command()(command)
