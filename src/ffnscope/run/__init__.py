"""The YAML runner: schema, stages, resume."""
