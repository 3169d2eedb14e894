"""The settings of a run: their schema, how arguments and YAML files become it."""
