"""Config of a Llama whose FFNs differ in width, as ``DeciLMForCausalLM`` of vLLM reads it. Lies beside the weights."""

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A mapping whose values are attributes too: ``block.ffn.intermediate_size``."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(LlamaConfig):
    """A Llama config with ``block_configs``, one per layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [Block({k: Block(v) for k, v in block.items()}) for block in block_configs or []]
