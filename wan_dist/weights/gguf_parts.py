"""Which weights of a transformer can stay in the blocks of its GGUF file."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from wan_dist.models.gguf_linear import RowDecoder, WeightPart
from wan_dist.models.kernels.gguf_blocks import BLOCK_FORMATS
from wan_dist.planning.lora_memory import count_merged_rows
from wan_dist.weights.files import TensorFiles
from wan_dist.weights.key_maps import KeyMap, TensorSource


def find_weight_parts(
    blocks: Mapping[str, nn.Module], files: TensorFiles, key_map: KeyMap
) -> dict[str, tuple[WeightPart, ...]]:
    """Return the parts of the weights of a transformer's blocks, by linear, where any can stay compressed."""
    return {
        name: tuple(_make_part(source, files) for source in sources)
        for name, sources in _iterate_linears(blocks, key_map)
        if any(_is_in_blocks(source, files) for source in sources)
    }


def _make_part(source: TensorSource, files: TensorFiles) -> WeightPart:
    if not _is_in_blocks(source, files):
        return WeightPart(None)
    type_name, update = files.get_type_name(source.key), source.update
    if update is None:
        return WeightPart(type_name)

    def merge(decode_rows: RowDecoder, target: Tensor) -> None:
        # As where weights are read, in as many rows at once: so results are the same.
        held_update = update.hold(target.device)
        num_at_once = count_merged_rows(target.shape[1])
        for start in range(0, len(target), num_at_once):
            target_rows = target[start : start + num_at_once]
            target_rows.copy_(held_update.merge_rows(decode_rows, start, start + len(target_rows)))

    return WeightPart(type_name, merge)


def _iterate_linears(
    blocks: Mapping[str, nn.Module], key_map: KeyMap
) -> Iterator[tuple[str, tuple[TensorSource, ...]]]:
    """Yield the name of each linear, and the sources of its weight."""
    for block_name, block in blocks.items():
        for linear_name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                name = f"{block_name}.{linear_name}"
                yield name, key_map.find_sources(f"{name}.weight")


def _is_in_blocks(source: TensorSource, files: TensorFiles) -> bool:
    # Rows of another shape than the parameter's are not runs of whole blocks.
    type_name, shape = files.get_type_name(source.key), files.shapes[source.key]
    return type_name in BLOCK_FORMATS and len(shape) == 2 and source.num_parts == 1


def count_changed_weights(
    blocks: Mapping[str, nn.Module], files: TensorFiles, key_map: KeyMap
) -> int:
    """Return how many weights in blocks LoRAs change."""
    return sum(
        _is_in_blocks(source, files) and source.update is not None
        for _, sources in _iterate_linears(blocks, key_map)
        for source in sources
    )
