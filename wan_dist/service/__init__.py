"""Service that makes videos on request: the video API, its queue on disk, and the worker of each rank."""
