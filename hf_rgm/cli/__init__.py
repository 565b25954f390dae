"""The `hf-rgm` command: one module per group of subcommands. Heavy imports happen when a command runs."""

import typer

from hf_rgm.cli import attribute, demo, distill, explore, sharing, validate

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """
    Training-data attribution for Hugging Face models.

    Exit status: 0 if all went well, 1 if not, 2 if the command line is not understood, 130 after Ctrl-C, which
    ends `explore` with 0. HF_RGM_DEBUG=1 in the environment shows where an error comes from.
    """


app.command()(demo.demo)
app.command()(distill.distill)
app.command()(attribute.attribute)
app.command()(validate.validate)
app.command()(explore.explore)
app.command()(sharing.info)
app.command()(sharing.push)
app.command()(sharing.pull)
