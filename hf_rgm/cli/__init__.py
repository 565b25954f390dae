"""The `hf-rgm` command: one module per group of subcommands, each importing what it needs when it is called."""

import typer

from hf_rgm.cli import demo, sharing

app = typer.Typer(no_args_is_help=True)


@app.callback()
def main() -> None:
    """Training-data attribution for Hugging Face models."""


app.command()(demo.demo)
app.command()(sharing.info)
app.command()(sharing.push)
app.command()(sharing.pull)
