"""Process runtime: errors, logging, files, signals, and the launcher's environment."""
