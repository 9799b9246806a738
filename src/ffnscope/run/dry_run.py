"""``ffnscope run --dry-run``: what stops the run is found, cheapest first, and what it would take is printed."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ffnscope.run.choices import background_hash, reference_bytes
from ffnscope.run.estimate import print_estimate
from ffnscope.run.folder import check_folder
from ffnscope.run.outputs import check_plots
from ffnscope.run.schema import RunConfig
from ffnscope.run.windows import check_texts


def dry_run(config: RunConfig, console: Console, *, overwrite: bool = False) -> None:
    """Print what a run would do; compute and write nothing.

    Raises:
        The errors of `ffnscope.run.run` that need no computing: the folder, a text, the background, a model, the
        reference model.
    """
    check_plots(config)
    check_folder(config, overwrite=overwrite)
    check_texts(config)
    _ = background_hash(config)  # refuses a file that is missing or damaged
    reference = reference_bytes(config)
    print_estimate(config, console, overwrite=overwrite)
    if reference:
        what = f"{reference / 2**30:.1f} GiB more beside the model, while it is checked and while scores are made"
        console.print(Text(f"the reference model {config.model.reference_id} takes {what}"))
