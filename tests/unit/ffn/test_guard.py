from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ffnscope.errors import ModelError
from ffnscope.ffn.guard import check_config, check_model
from tiny import tiny


class TestConfig:
    @pytest.mark.parametrize(
        ("value", "name"),
        [
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
            ({"quant_method": "awq"}, "awq"),
            (SimpleNamespace(quant_method=SimpleNamespace(value="bitsandbytes")), "bitsandbytes"),
            ({"bits": 4}, "an unnamed method"),
        ],
    )
    def test_quantised(self, llama: Any, value: Any, name: str) -> None:
        llama.config.quantization_config = value
        message = rf"org/model is quantised with {name}; its channels are not plain weights. Load the unquantised"
        with pytest.raises(ModelError, match=message):
            check_config(llama.config, "org/model")

    def test_quantised_inside_a_text_config(self) -> None:
        text = SimpleNamespace(quantization_config={"quant_method": "fp8"})
        with pytest.raises(ModelError, match="quantised with fp8"):
            check_config(SimpleNamespace(get_text_config=lambda: text), "m")

    def test_plain(self, llama: Any) -> None:
        check_config(llama.config, "m")


class TestModel:
    @pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3"])
    def test_plain(self, arch: str) -> None:
        check_model(tiny(arch))

    def test_loaded_by_a_quantiser(self, llama: Any) -> None:
        llama.hf_quantizer = object()
        with pytest.raises(ModelError, match="LlamaForCausalLM is quantised; its channels are not plain weights"):
            check_model(llama)
        llama.config.quantization_config = {"quant_method": "gguf"}
        with pytest.raises(ModelError, match="LlamaForCausalLM is quantised with gguf"):
            check_model(llama)

    @pytest.mark.parametrize("module", ["bitsandbytes.nn.modules", "gptqmodel.nn_modules", "awq.modules.linear"])
    def test_a_quantised_layer(self, llama: Any, module: str) -> None:
        packed = type("PackedLinear", (nn.Linear,), {"__module__": module})
        llama.model.layers[1].mlp.up_proj = packed(32, 48)
        with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj of LlamaForCausalLM is a quantised layer"):
            check_model(llama)

    def test_a_quantised_weight(self, llama: Any) -> None:
        packed = type("AffineQuantizedTensor", (nn.Parameter,), {"__module__": "torchao.dtypes"})
        llama.model.layers[0].mlp.up_proj.weight = packed(torch.zeros(48, 32))
        with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj of LlamaForCausalLM is a quantised layer"):
            check_model(llama)

    @pytest.mark.parametrize("name", ["peft_config", "_hf_peft_config_loaded"])
    def test_an_adapter(self, llama: Any, name: str) -> None:
        setattr(llama, name, {"default": 1})
        with pytest.raises(ModelError, match=r"Merge it first: model = model.merge_and_unload\(\)"):
            check_model(llama)

    def test_tensor_parallel(self, llama: Any) -> None:
        llama._tp_size = 2
        with pytest.raises(ModelError, match="is tensor-parallel: each process holds a slice of the channels"):
            check_model(llama)

    def test_compiled(self, llama: Any) -> None:
        with pytest.raises(ModelError, match=r"wrapped by torch.compile, which hides its FFNs. Pass the"):
            check_model(torch.compile(llama))  # type: ignore[arg-type]
