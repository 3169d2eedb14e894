"""Run configuration: the schema of the settings, and its composition from arguments and YAML files."""
