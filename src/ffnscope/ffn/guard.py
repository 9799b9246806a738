"""Refuse models whose channels cannot be read or removed truthfully, by name and with the cure."""

from __future__ import annotations

from typing import Any

from torch import nn

from ffnscope.errors import ModelError

_CURE_QUANTISED = (
    "Load the unquantised checkpoint that it was made from (for GGUF, give the .gguf file itself as model_id: it is "
    "dequantised on loading)."
)


def check_config(config: Any, model_id: str) -> None:
    """Raise ModelError when a config announces quantised weights."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if found:
        kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        name = str(getattr(kind, "value", kind) or "an unnamed method")
        raise ModelError(f"{model_id} is quantised with {name}; its channels are not plain weights. {_CURE_QUANTISED}")


def check_model(model: nn.Module) -> None:
    """Raise ModelError for a quantised, adapter-wrapped, tensor-parallel or compiled model."""
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        check_config(model.config, name)
        raise ModelError(f"{name} is quantised; its channels are not plain weights. {_CURE_QUANTISED}")
    packed = next((n for n, m in model.named_modules() if _is_packed(m)), None)
    if packed is not None:
        raise ModelError(f"{packed} of {name} is a quantised layer. {_CURE_QUANTISED}")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{name} carries an adapter (PEFT), which adds to the weights that would be scored and removed. Merge it "
            "first: model = model.merge_and_unload()."
        )
    if getattr(model, "_tp_size", None) or any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise ModelError(
            f"{name} is tensor-parallel: each process holds a slice of the channels. Load it without tp_plan, for "
            "example with device_map='auto'."
        )
    if type(model).__name__ == "OptimizedModule":
        raise ModelError("the model is wrapped by torch.compile, which hides its FFNs. Pass the original model.")


def _is_packed(module: nn.Module) -> bool:
    kinds = [type(module), *(type(p) for p in module.parameters(recurse=False))]
    return any(kind.__module__.startswith(_QUANTISERS) for kind in kinds)


_QUANTISERS = ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "autoawq", "optimum.quanto", "torchao", "hqq")
