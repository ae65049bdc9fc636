"""What runs inside vLLM's own workers: taking in new weights. Loaded by vLLM, by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from safetensors import safe_open


class WeightReceiver:
    """Mixed into every vLLM worker (worker_extension_cls)."""

    model_runner: Any
    vllm_config: Any

    def selfpref_load(self, files: list[str]) -> None:
        """Load every tensor of some safetensors files; the caller has verified them.

        A plain load_weights would write into weights that were repacked for the processor or the
        quantisation; vLLM's layerwise reload unpacks, loads and packs again.
        """
        config = import_module("vllm.config")
        reload = import_module("vllm.model_executor.model_loader.reload")
        model = self.model_runner.get_model()
        with config.set_current_vllm_config(self.vllm_config), torch.inference_mode():
            _forget_packed_experts(model)
            reload.initialize_layerwise_reload(model)
            model.load_weights(_tensors(files))
            reload.finalize_layerwise_reload(model, self.model_runner.model_config)
            _pack_tied_head(model)


def _tensors(files: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                yield name, handle.get_tensor(name)


def _forget_packed_experts(model: Any) -> None:
    """On a CPU experts that have a kernel already are not packed again, and the old ones serve."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        on_cpu = all(tensor.device.type == "cpu" for tensor in layer.parameters())
        if on_cpu and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None  # type: ignore[union-attr]


def _pack_tied_head(model: Any) -> None:
    """An output layer tied to the embedding keeps its old packed weights otherwise, silently."""
    head = getattr(model, "lm_head", None)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    method = getattr(head, "quant_method", None)
    if tied and method is not None:
        method.process_weights_after_loading(head)
