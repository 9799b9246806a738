"""The YAML runner: schema, stages, resume."""

from ffnscope.run.earlier import find_record
from ffnscope.run.load import config_from_dict, dump_config, load_config
from ffnscope.run.runner import RunResult, run
from ffnscope.run.schema import RunConfig

__all__ = ["RunConfig", "RunResult", "config_from_dict", "dump_config", "find_record", "load_config", "run"]
