"""The YAML runner: schema, stages, resume."""

from ffnscope.run.earlier import find_record
from ffnscope.run.load import config_from_dict, dump_config, load_config
from ffnscope.run.runner import RunResult, run
from ffnscope.run.schema import RunConfig
from ffnscope.run.sweep import SweepResult, run_sweep
from ffnscope.run.sweep_cells import SweepConfig, load_sweep

__all__ = [
    "RunConfig",
    "RunResult",
    "SweepConfig",
    "SweepResult",
    "config_from_dict",
    "dump_config",
    "find_record",
    "load_config",
    "load_sweep",
    "run",
    "run_sweep",
]
