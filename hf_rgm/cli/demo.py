"""`hf-rgm demo`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hf_rgm.cli import common
from hf_rgm.cli.common import clear_errors, hide_bars


def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write to.")] = Path("hf-rgm-demo"),
    seed: Annotated[int, typer.Option(help="Seed of data split, training and distilling.")] = 0,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
) -> None:
    """
    Find the vendor that mislabels handwritten digits, see the model without it, and check; needs no network.

    Example: hf-rgm demo -o my-demo
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The environment must be set before these are imported.
    import torch
    import transformers

    from hf_rgm.demo import DemoSettings, run_demo

    torch.set_num_threads(1)  # where cores are shared, more made distilling many times slower
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    again = f"{output_dir} holds an unfinished demo; run the same command again to start over."
    with clear_errors(again):
        try:
            run_demo(
                output_dir,
                settings=DemoSettings(seed=seed),
                overwrite=overwrite,
                disable_tqdm=hide_bars(quiet),
                say=typer.echo,
            )
        except FileExistsError as error:
            raise typer.BadParameter(str(error), param_hint="--output-dir") from error
