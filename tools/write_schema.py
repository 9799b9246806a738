"""Write ``docs/ffnscope.schema.json``, the JSON Schema of a run's YAML. Run it after a change of keys or metrics.

python tools/write_schema.py
"""

from __future__ import annotations

from pathlib import Path

from ffnscope.io import write_json
from ffnscope.run.json_schema import json_schema

TARGET = Path(__file__).parents[1] / "docs" / "ffnscope.schema.json"

if __name__ == "__main__":
    write_json(TARGET, json_schema())
