"""Fields of a request whose values are files; shared by the service and its client, so it imports nothing."""

IMAGE_FIELDS = ("image", "first_frame", "last_frame")
"""Those that are settings under the same name."""
UPLOAD_FIELDS = ("input_reference", *IMAGE_FIELDS)
"""Fields whose values are images; ``input_reference`` is the task's first one."""
