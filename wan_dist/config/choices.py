"""Values that settings of texts can have; no torch."""

EIGHT_BIT_BACKENDS = ("8bit", "sage")
TRAINED_ATTENTIONS = ("sla", "vsa")
"""Sparse self-attention of transformers that were trained with it."""
ATTENTION_BACKENDS = (
    "auto",
    "fa4",
    "fa3",
    "fa2",
    "cudnn",
    "flash",
    "sdpa",
    "sdpa16",
    *TRAINED_ATTENTIONS,
    *EIGHT_BIT_BACKENDS,
)
QUANTIZATIONS = ("none", "fp8", "int8", "int4")
DEVICES = ("auto", "cuda", "cpu")
NOISE_DEVICES = ("cpu", "cuda")
FITS = ("stretch", "crop")
SYNC_CHOICES = ("exact", "reference")
NOISE_LAYOUTS = ("channels_first", "frames_first")
