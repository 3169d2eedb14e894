"""Memory that reading weights takes beside them; no torch."""

from wan_dist.planning.workload import FLOAT_BYTES

NUM_READERS = 4
"""Threads that read weights for a GPU."""
READ_VALUES = 2**21
"""Values that one of them converts, decodes or quantises at once."""
PINNED_CHUNK_BYTES = 2**23
"""Bytes of each of a thread's two page-locked buffers."""
_NUM_COPIES = 4
"""Copies of these values in float32: as stored, decoded, scaled, rounded."""
READING_GPU_BYTES = NUM_READERS * _NUM_COPIES * READ_VALUES * FLOAT_BYTES
READING_HOST_BYTES = NUM_READERS * 2 * PINNED_CHUNK_BYTES
"""Page-locked; PyTorch keeps it until the process ends."""
