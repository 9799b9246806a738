"""Peak memory of a streamed model through all stages, beside the size of its weights.

    python benchmarks/streaming.py --layers 24 --hidden 768

A random Llama is written to disk block by block, calibrated with gradients, planned, reconstructed into a new
checkpoint, and evaluated there, each stage in this one process. Anonymous memory is what the process needs; pages of
files that are mapped (the weights as they are read) can be dropped by the system at any time and are told apart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import ffnscope as fs
from ffnscope.calibrate.windows import contiguous_windows

MIB = 2**20


class Peak:
    """Samples the memory of this process, in MiB, until it is left."""

    def __enter__(self) -> Peak:
        self.anonymous, self.mapped, self.seconds = 0.0, 0.0, 0.0
        self._ended = threading.Event()
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(rows["RssAnon"].split()[0]) / 1024)
            self.mapped = max(self.mapped, int(rows["RssFile"].split()[0]) / 1024)


def write_model(folder: Path, layers: int, hidden: int, vocabulary: int) -> float:
    """Write a random Llama shard by shard; its weights in MiB."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, **sizes, **heads, dtype="float32")
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    groups: dict[str, list[str]] = {}
    for name in state:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:3]) if "layers" in parts else "rest", []).append(name)
    index: dict[str, str] = {}
    total = 0
    random = torch.Generator().manual_seed(0)
    for i, names in enumerate(groups.values()):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        values = {
            n: torch.randn(state[n].shape, generator=random) / state[n].shape[-1] ** 0.5
            if state[n].dim() > 1
            else torch.ones(state[n].shape)
            for n in names
        }
        save_file(values, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        total += sum(v.numel() * v.element_size() for v in values.values())
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total / MIB


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="b").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("layers", 24), ("hidden", 768), ("vocabulary", 8192), ("windows", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--place", default="disk")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp())
    try:
        (root / "dense").mkdir()
        size = write_model(root / "dense", asked.layers, asked.hidden, asked.vocabulary)
        write_tokenizer(root / "dense")
        ids = torch.randint(0, asked.vocabulary, (asked.windows, asked.length))
        run(root, size, contiguous_windows(ids, "random tokens"), asked)
    finally:
        shutil.rmtree(root)


def run(root: Path, size: float, windows: Any, asked: Any) -> None:
    with Peak() as idle:
        time.sleep(0.05)
    block = (size - 2 * asked.vocabulary * asked.hidden * 4 / MIB) / asked.layers
    print(f"weights {size:,.0f} MiB, one block {block:,.0f} MiB; before loading {idle.anonymous:,.0f} MiB anonymous")

    def load(name: str) -> Any:
        return fs.load_model(fs.ModelSource(str(root / name), device="cpu", stream=asked.place))

    def tell(stage: str, peak: Peak) -> None:
        more = peak.anonymous - idle.anonymous
        print(
            f"{stage:<12} {more:>7,.0f} MiB anonymous more ({more / size:.0%} of the weights), {peak.mapped:>6,.0f} MiB"
            f" mapped at most, {peak.seconds:.1f} s",
            flush=True,
        )

    with Peak() as peak:
        loaded = load("dense")
    tell("load", peak)
    with Peak() as peak:
        stats = fs.calibrate(loaded.model, windows, ["scar_loss_proxy"], options=fs.PassOptions(batch_size=2))
    tell("calibrate", peak)
    with Peak() as peak:
        plan = fs.build_plan(fs.score(loaded.model, stats, "scar_loss_proxy"), 0.5)
    tell("score, plan", peak)
    with Peak() as peak:
        out = fs.Destination(root / "half")
        fs.reconstruct_to(loaded.model, loaded.tokenizer, out, windows, plan, fs.SequentialOptions(batch_size=2))
    tell("reconstruct", peak)
    with Peak() as peak:
        again = load("half")
        value = fs.perplexity(again.model, windows, batch_size=2).value
    tell("evaluate", peak)
    print(f"perplexity {value:,.1f}")


if __name__ == "__main__":
    main()
