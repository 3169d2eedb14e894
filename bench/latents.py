"""Compare saved latents with those of a first file: relative and largest difference, bit-identity.

python bench/latents.py FIRST.latents.safetensors OTHER.latents.safetensors ...
"""

import sys

from safetensors.torch import load_file

first = load_file(sys.argv[1])["latents"].double()
for name in sys.argv[2:]:
    other = load_file(name)["latents"].double()
    distance = ((other - first).norm() / first.norm()).item()
    print(
        f"{name}: relative {distance:.2e}, largest {(other - first).abs().max():.2e}, "
        f"identical {bool((other == first).all())}"
    )
