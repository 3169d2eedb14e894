"""One model of a checkpoint: what it is built of and filled from, loaded when needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from wan_dist.runtime.log import logger
from wan_dist.weights.files import TensorFiles, format_first_ten
from wan_dist.weights.key_maps import KeyMap
from wan_dist.weights.layout import ComponentFiles
from wan_dist.weights.load import check_keys, fill_model, fill_parameters
from wan_dist.weights.streaming import StreamingOptions, stream_blocks
from wan_dist.weights.tokenizer_files import SENTENCEPIECE_KEY

Model = TypeVar("Model", bound=nn.Module)
Dims = TypeVar("Dims")


@dataclass(frozen=True)
class Component(Generic[Model, Dims]):
    """One model of a checkpoint: its dims, constructor, files of weights and key map."""

    dims: Dims
    build_model: Callable[..., Model]
    files: TensorFiles
    key_map: KeyMap

    def load(
        self,
        device: torch.device,
        *,
        prepare_model: Callable[[Model], None] | None = None,
        streaming: StreamingOptions | None = None,
        **options: object,
    ) -> Model:
        """Return the model on ``device``; ``options`` go to its constructor.

        ``prepare_model`` may shard it, on the meta device, before it is filled. With ``streaming`` the
        weights of its blocks stay on the host or on disk and are copied to the device one after another.
        """
        with torch.device("meta"):
            model = self.build_model(**options)
        if prepare_model is not None:
            prepare_model(model)
        if streaming is None:
            fill_model(model, self.files, self.key_map, device)
            return model
        layers = streaming.list_layers(model)
        layer_names = list(layers)
        skip_prefixes = (*(f"{name}." for name in layer_names), *streaming.skip_prefixes)
        fill_model(model, self.files, self.key_map, device, skip_prefixes=skip_prefixes)

        def fill_block(index: int, parameters: dict[str, Tensor]) -> None:
            parameters_by_name = {
                f"{layer_names[index]}.{name}": value for name, value in parameters.items()
            }
            fill_parameters(parameters_by_name, self.files, self.key_map, device)

        stream_blocks(
            list(layers.values()),
            fill_block,
            device,
            from_disk=streaming.from_disk,
            num_rounds=streaming.num_rounds,
        )
        return model

    def load_parts(self, names: Sequence[str], device: torch.device) -> dict[str, nn.Module]:
        """Return submodules of the model, by name, on ``device``; nothing else is read."""
        with torch.device("meta"):
            model = self.build_model()
        parts = {name: model.get_submodule(name).to_empty(device=device) for name in names}
        parameters = {
            f"{name}.{key}": parameter
            for name, part in parts.items()
            for key, parameter in part.named_parameters()
        }
        with torch.no_grad():
            fill_parameters(parameters, self.files, self.key_map, device)
        return {name: part.eval().requires_grad_(False) for name, part in parts.items()}

    def read_parameter_rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return the rows of one parameter at ``indices``, on the CPU; nothing else of it is read."""
        (source,) = self.key_map.find_sources(name)
        return torch.cat(
            [
                self.files.read_values(source.key, index, index + 1, torch.device("cpu"))
                for index in indices
            ]
        )


def open_component(
    component_files: ComponentFiles,
    infer_dims: Callable[..., Dims],
    build_model: Callable[..., Model],
) -> Component[Model, Dims]:
    """Open one model of a checkpoint and check the tensors of its files against its parameters."""
    config, files, key_map = component_files.open()
    dims = infer_dims(config, files, key_map)
    component = Component(dims, lambda **options: build_model(dims, **options), files, key_map)
    with torch.device("meta"):
        unused_keys = check_keys([component.build_model()], files, key_map)
    if component_files.setting is not None:
        _log_unused_tensors(files, unused_keys)
    return component


def _log_unused_tensors(files: TensorFiles, keys: Sequence[str]) -> None:
    """Log the modules whose tensors are not needed, such as a layer after the last one that is read."""
    modules = {key.rpartition(".")[0] or key for key in keys if key != SENTENCEPIECE_KEY}
    if modules:
        logger.info("unused    in %s: %s", files, format_first_ten(sorted(modules)))
