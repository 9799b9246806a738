"""The stages of `benchmarks/scale.py`, each of which runs in a process of its own: scale_stages.py STAGE SETTINGS.json.

A stage first measures what bounds it: how fast the files that it reads come in (read twice, the quicker one counts,
so with a warm page cache where memory allows) and how fast this machine multiplies matrices of the model's shape.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHUNK = 2**23


def write_model(folder: Path, asked: dict[str, Any]) -> int:
    """Write a random Llama shard by shard, one block at a time; its weights in bytes."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, dtype = asked["hidden"], getattr(torch, asked["dtype"])
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": asked["layers"]}
    config = AutoConfig.for_model("llama", vocab_size=asked["vocabulary"], **sizes, **heads, dtype=asked["dtype"])
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    groups: dict[str, list[str]] = {}
    for name in state:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:3]) if "layers" in parts else "rest", []).append(name)
    index: dict[str, str] = {}
    total = 0
    for i, names in enumerate(groups.values()):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        random = torch.Generator().manual_seed(i)
        values = {n: _values(state[n].shape, random, dtype) for n in names}
        save_file(values, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        total += sum(v.numel() * v.element_size() for v in values.values())
        del values
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    _write_tokenizer(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def _values(shape: torch.Size, random: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.rand(shape, generator=random).sub_(0.5).mul_((12 / shape[-1]) ** 0.5).to(dtype)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="b").save_pretrained(folder)


def read_seconds(folder: Path) -> tuple[float, int]:
    """Time of reading all weights of a checkpoint into one buffer, the quicker of two, and their bytes."""
    times: list[float] = []
    buffer = bytearray(CHUNK)
    for _ in range(2):
        start, total = time.perf_counter(), 0
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
        times.append(time.perf_counter() - start)
    return min(times), total


def flop_per_second(asked: dict[str, Any], rows: int, dtype: torch.dtype) -> float:
    """Measured speed of a matrix product of so many rows with a matrix of the FFN's shape, the best of five."""
    a = torch.randn(rows, asked["hidden"], device=asked["device"], dtype=dtype)
    b = torch.randn(asked["hidden"], 4 * asked["hidden"], device=asked["device"], dtype=dtype)
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * a.shape[0] * b.numel() / min(times)


def texts(asked: dict[str, Any]) -> tuple[Any, Any]:
    """Random tokens to calibrate on, and others to evaluate on."""
    from ffnscope.calibrate.windows import contiguous_windows

    random = torch.Generator().manual_seed(0)
    shape = (2 * asked["windows"], asked["length"])
    ids = torch.randint(0, asked["vocabulary"], shape, generator=random)
    halves = ids.split(asked["windows"])
    return contiguous_windows(halves[0], "random tokens"), contiguous_windows(halves[1], "other random tokens")


def load(asked: dict[str, Any], name: str) -> Any:
    """The checkpoint of this name, streamed."""
    import ffnscope as fs

    return fs.load_model(fs.ModelSource(str(root(asked) / name), device=asked["device"], stream=asked["place"]))


def root(asked: dict[str, Any]) -> Path:
    """The folder of the results."""
    return Path(asked["work"])


def make(asked: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint."""
    (root(asked) / "dense").mkdir(exist_ok=True)
    return {"weights": write_model(root(asked) / "dense", asked)}


def idle(asked: dict[str, Any]) -> dict[str, Any]:
    """What the imported libraries take: a model of no size is loaded, streamed and run."""
    import ffnscope as fs
    from ffnscope.calibrate.windows import contiguous_windows

    folder = root(asked) / "nothing"
    folder.mkdir(exist_ok=True)
    small = {**asked, "hidden": 64, "layers": 2, "vocabulary": 64}
    write_model(folder, small)
    windows = contiguous_windows(torch.randint(0, 64, (2, 16)), "random tokens")
    fs.calibrate(load(asked, "nothing").model, windows, ["scar_loss_proxy"])
    return {}


def calibrate(asked: dict[str, Any]) -> dict[str, Any]:
    """Statistics with gradients."""
    import ffnscope as fs

    stats = fs.calibrate(
        load(asked, "dense").model,
        texts(asked)[0],
        ["scar_loss_proxy"],
        options=fs.PassOptions(batch_size=asked["batch"]),
    )
    fs.write_stats(root(asked) / "stats.safetensors", stats.values(), {})
    return {}


def plan(asked: dict[str, Any]) -> dict[str, Any]:
    """Half of the channels, by scores of the statistics."""
    import ffnscope as fs

    stats, _ = fs.read_stats(root(asked) / "stats.safetensors")
    made = fs.build_plan(fs.score(load(asked, "dense").model, stats, "scar_loss_proxy"), 0.5)
    fs.write_plan(root(asked) / "plan.json", made)
    return {"sparsity": made.sparsity}


def reconstruct(asked: dict[str, Any]) -> dict[str, Any]:
    """Down projections fitted block by block, each written when it is found."""
    import ffnscope as fs

    loaded, made = load(asked, "dense"), fs.read_plan(root(asked) / "plan.json")
    out = fs.Destination(root(asked) / "half", overwrite=True)
    options = fs.SequentialOptions(batch_size=asked["batch"])
    fs.reconstruct_to(loaded.model, loaded.tokenizer, out, texts(asked)[0], made, options)
    return {}


def evaluate(asked: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of what was saved, on other windows."""
    import ffnscope as fs

    return {"perplexity": fs.perplexity(load(asked, "half").model, texts(asked)[1], batch_size=asked["batch"]).value}


def bounds(stage: str, asked: dict[str, Any]) -> dict[str, float]:
    """Seconds that reading and multiplying take at least, for a machine that does not hold the weights.

    Gradients need two readings (forward and backward) and three products per weight (forward, again, and the gradient
    of the input); a reconstruction one reading, the dense and the cut block, the Gram matrix of the channels, and in
    float64 a Cholesky factorisation and two triangular solves for every damping that is tried and the one that is
    taken; its writing is not in the bound. An evaluation runs the cut model.
    """
    from ffnscope.apply.refit import DAMPINGS

    hidden, tokens = asked["hidden"], asked["windows"] * asked["length"]
    attention, ffn, head = 4 * hidden**2, 12 * hidden**2, asked["vocabulary"] * hidden
    dense, cut = asked["layers"] * (attention + ffn), asked["layers"] * (attention + ffn / 2)
    reads, flop = {
        "calibrate": (2, 6 * tokens * (dense + head)),
        "reconstruct": (1, 2 * tokens * (dense + cut) + 2 * tokens * asked["layers"] * (4 * hidden) ** 2),
        "evaluate": (1, 2 * tokens * (cut + head)),
        "plan": (1, 0),
    }[stage]
    seconds, size = read_seconds(root(asked) / ("half" if stage == "evaluate" else "dense"))
    speed = flop_per_second(asked, asked["batch"] * asked["length"], getattr(torch, asked["dtype"]))
    found = {"io": reads * seconds, "flop": flop / speed, "read_rate": size / seconds, "flop_rate": speed}
    if stage == "reconstruct":
        kept = 2 * hidden
        solves = asked["layers"] * (len(DAMPINGS) + 1) * (kept**3 / 3 + 2 * kept**2 * hidden)
        found["flop"] += solves / flop_per_second(asked, kept, torch.float64)
    return found


STAGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "make": make,
    "idle": idle,
    "calibrate": calibrate,
    "plan": plan,
    "reconstruct": reconstruct,
    "evaluate": evaluate,
}
MEASURED = ("calibrate", "plan", "reconstruct", "evaluate")


def main() -> None:
    stage, asked = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    found: dict[str, Any] = bounds(stage, asked) if stage in MEASURED else {}
    start = time.perf_counter()
    found |= STAGES[stage](asked)
    found["seconds"] = time.perf_counter() - start
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    found["VmHWM"] = int(rows["VmHWM"].split()[0]) * 1024
    (root(asked) / f"{stage}.result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    main()
