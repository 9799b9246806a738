"""The YAML contract: one frozen block per mapping, and what the runner asks of the whole.

A `RunConfig` is made by `ffnscope.run.load`, which also checks what needs several blocks (`ffnscope.run.checks`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool

from ffnscope.apply.export import SHARD_SIZE
from ffnscope.evaluate.tasks import TaskOptions
from ffnscope.registry import METRICS
from ffnscope.run.analysis_blocks import Ablation, Concentration, CrossLayer, Halo, Stability
from ffnscope.run.contextual_block import Contextual, SecondText
from ffnscope.run.defaults import RANKING, TextDefaults, defaults_of
from ffnscope.run.evaluation_block import Evaluation, ExtraText
from ffnscope.run.fields import (
    Block,
    Count,
    Device,
    DeviceMap,
    Distinct,
    FolderName,
    Fraction,
    Keywords,
    Length,
    MaxMemory,
    MetricName,
    NotEmpty,
    OwnModule,
    Seed,
    Text,
)
from ffnscope.run.metric_arguments import parse_arguments
from ffnscope.run.pruning_block import Pruning
from ffnscope.run.saving import Form
from ffnscope.run.texts import TextSource, held_out_split

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class Experiment(Block):
    """What the run is called, where it computes, and its seed."""

    name: FolderName = "ffnscope_run"
    """Name of the run; results go to runs/<name> unless output.dir says otherwise."""
    type: Literal["llm_alignment", "llm_supernode", "llm"] = "llm_alignment"
    """Kind of experiment as the guide names it; all three run the same stages."""
    device: Device = "auto"
    """auto (CUDA when there is one, else CPU), cpu, cuda, cuda:N or mps."""
    seed: Seed = 42
    """Seed of everything that is drawn at random."""


class Model(Block):
    """Which model is loaded, and how."""

    name: Literal["hf_causal_lm"] = "hf_causal_lm"
    """Kind of model: a causal language model of Hugging Face transformers."""
    model_id: Text
    """Hub id, local directory, .gguf file, or package:DIST for the GGUF file inside an installed distribution."""
    revision: Text | None = None
    """Commit, tag or branch on the hub."""
    dtype: Dtype = "auto"
    """Floating-point type of the weights; auto takes the checkpoint's."""
    device_map: DeviceMap = None
    """Placement over devices as transformers takes it ("auto", or module: device, cpu or disk); null: everything on
    experiment.device."""
    max_memory: MaxMemory = None
    """Limit per device for device_map: {'0': 20GiB, cpu: 60GiB}; what does not fit goes to memory, then to disk."""
    offload_folder: Text | None = None
    """Folder for weights that device_map puts on disk and that cannot be read from the checkpoint's own files."""
    stream: Literal["device", "cpu", "disk"] | None = None
    """For a model that does not fit: its weights stay in their files and are read one decoder block at a time, for all
    windows. The value is where hidden states wait between blocks; disk is offload_folder. null: off."""
    cache_dir: Text | None = None
    """Folder of the hub's files; null: that of the hub client (HF_HOME)."""
    token_env: Text | None = None
    """Environment variable that holds the access token of the hub; null: HF_TOKEN, or the login of `hf auth login`."""
    offline: StrictBool = False
    """Use no network: only files that are in the cache already."""
    allow_pickle: StrictBool = False
    """Also load weights that are pickle files (pytorch_model.bin) and not safetensors."""
    trust_remote_code: StrictBool = False
    """Allow Python code that comes with the checkpoint to run."""
    tracked_layers: Annotated[tuple[Text, ...], NotEmpty] | None = None
    """Patterns of projection names (`*`, `[a-b]`): an FFN is analysed when a projection of it matches. null: all."""
    tokenizer_kwargs: Keywords = Field(default_factory=dict)
    """Further arguments of AutoTokenizer.from_pretrained."""
    model_kwargs: Keywords = Field(default_factory=dict)
    """Further arguments of AutoModelForCausalLM.from_pretrained."""
    reference_id: Text | None = None
    """Model before fine-tuning, for delta_alignment: a model_id."""


class Dataset(TextSource):
    """Text that calibrates; also the base of the evaluation text."""

    name: Text = "sotu"
    """Shipped text (sotu, pydoc_topics, ...), hub dataset (wikitext, allenai/c4, ...), local folder, .txt or .jsonl."""
    split: Text | None = "train"
    """Part of the text that calibrates; a local file has none."""
    mix: tuple[ExtraText, ...] = ()
    """Further texts that calibrate, in equal parts with this one; where pruned models are reconstructed and neither
    name, split nor mix is given, all other shipped texts."""
    batch_size: Count = 1
    """Windows per forward pass of the evaluation."""


class Calibration(Block):
    """How many tokens the statistics are summed over, and how they are cut."""

    num_samples: Count | None = None
    """Token windows; null: 64, or where pruned models are reconstructed 128, with a refit as many more as give every
    FFN 4 tokens per channel and the text has."""
    max_length: Length | None = None
    """Tokens per window; null: 512, or where pruned models are reconstructed 256."""
    batch_size: Count = 4
    """Windows per forward pass; changes memory and speed, not the statistics."""
    mode: Literal["contiguous", "lines", "chat"] = "contiguous"
    """contiguous: blocks without padding; lines: one text row per window; chat: rows through the chat template."""
    answers_only: StrictBool = False
    """Count the loss on the assistant's turns only (mode chat)."""
    seed: Seed | None = None
    """Seed that chooses the windows; null: experiment.seed."""
    checkpoint_every: Count = 8
    """Batches between two saved states of the sums, from which an interrupted pass goes on."""


class Scar(Block):
    """The SCAR metrics, which need a backward pass."""

    enabled: StrictBool = True
    """Score the scar_* metrics."""
    num_samples: Count | None = None
    """How many of the calibration windows also run backward; null: 128 where pruned models are reconstructed and
    neither supernode nor concentration is enabled, else all."""
    max_length: Length | None = None
    """Tokens that these windows are cut to; null: calibration.max_length."""


class Metrics(Block):
    """Metrics to score beyond those that prune. A further key is the name of a metric and holds its parameters."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any] | None] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    modules: Annotated[tuple[OwnModule, ...], Distinct] = ()
    """Modules to import, in the working folder or installed, that register metrics or allocators of your own."""
    enabled: Annotated[tuple[MetricName, ...], Distinct] = ()
    """Further metrics to score and report."""
    scar: Scar = Field(default_factory=Scar)
    """The SCAR metrics."""
    background: Text | None = None
    """Statistics of another text that `ffnscope score` wrote (statistics.safetensors), for teleport: contrast."""

    @property
    def params(self) -> dict[str, dict[str, Any]]:
        """Metric name -> its parameters as the YAML gives them."""
        return {name: dict(block or {}) for name, block in (self.__pydantic_extra__ or {}).items()}


class Supernode(Block):
    """The channels that carry most of the loss: how they are found, and whether pruning may touch them."""

    enabled: StrictBool = False
    """Find the core of every FFN."""
    score_metric: MetricName = "scar_loss_proxy"
    """Metric whose top channels are the core."""
    core_fraction: Fraction | None = None
    """Share of the channels that is the core; 0.01 unless top_k is given."""
    top_k: Count | None = None
    """Number of core channels per FFN, in place of core_fraction."""
    halo_fraction: Fraction | None = None
    """Share of the non-core channels that is the halo, for the supernode_* metrics and the halo block; null: 0.1."""
    null_pool: Count | None = None
    """Channels per FFN that null cores of halo and cross_layer are drawn from, beside the core's own; null: 10 per core
    channel and at least 100, as far as their sums stay below 4 GiB."""
    protect_core: StrictBool = True
    """Keep the core in every pruning plan, whatever the metric."""
    stability: Stability = Field(default_factory=Stability)
    """Would other text give the same core?"""


class Output(Block):
    """Where results go."""

    dir: Text | None = None
    """Folder of the results; null: runs/<experiment.name>."""
    plots: StrictBool = True
    """Draw the plots."""
    report: StrictBool = True
    """Write report.html, one page with tables and figures that opens without a network."""
    checkpoints: StrictBool = False
    """Save every pruned model as checkpoints/<metric>-<sparsity>, with the measured numbers in its model card."""
    format: Form = "transformers"
    """Form of these checkpoints: transformers (a folder), decilm (for vLLM) or gguf (a file)."""
    pad_to_widest: StrictBool = False
    """Zero-pad FFNs of different widths to the widest, so that every loader takes them."""
    max_shard_size: Annotated[Text, Field(pattern=SHARD_SIZE)] = "5GB"
    """Largest safetensors file, a number with KB, MB, GB or TB."""


class RunConfig(Block):
    """One YAML file."""

    experiment: Experiment = Field(default_factory=Experiment)
    model: Model
    dataset: Dataset = Field(default_factory=Dataset)
    calibration: Calibration = Field(default_factory=Calibration)
    metrics: Metrics = Field(default_factory=Metrics)
    supernode: Supernode = Field(default_factory=Supernode)
    concentration: Concentration = Field(default_factory=Concentration)
    halo: Halo = Field(default_factory=Halo)
    cross_layer: CrossLayer = Field(default_factory=CrossLayer)
    ablation: Ablation = Field(default_factory=Ablation)
    pruning: Pruning = Field(default_factory=Pruning)
    contextual: Contextual = Field(default_factory=Contextual)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    output: Output = Field(default_factory=Output)

    @property
    def seed(self) -> int:
        """Seed that chooses the calibration windows."""
        return self.experiment.seed if self.calibration.seed is None else self.calibration.seed

    @property
    def text_defaults(self) -> TextDefaults:
        """How much text calibrates where the configuration does not say."""
        return defaults_of(self.pruning.reconstruct if self.pruning.enabled else "none")

    @property
    def grows(self) -> bool:
        """Whether there are more calibration windows where FFNs are wider."""
        return self.calibration.num_samples is None and self.pruning.refitted

    @property
    def num_samples(self) -> int:
        """Calibration windows; at least as many where they are left to the widest FFN (see `sized`)."""
        return self.calibration.num_samples or self.text_defaults.windows

    @property
    def max_length(self) -> int:
        """Tokens per calibration window."""
        return self.calibration.max_length or self.text_defaults.length

    @property
    def scar_num_samples(self) -> int:
        """Calibration windows that also run backward."""
        analyses = self.supernode.enabled or self.concentration.enabled
        default = None if analyses else self.text_defaults.backward
        return self.metrics.scar.num_samples or min(default or self.num_samples, self.num_samples)

    @property
    def scar_max_length(self) -> int:
        """Tokens that the windows of the backward pass are cut to."""
        return self.metrics.scar.max_length or self.max_length

    @property
    def evaluation_max_length(self) -> int:
        """Tokens per window of the held-out texts; the same for every method."""
        return self.evaluation.max_length or self.calibration.max_length or RANKING.length

    @property
    def output_dir(self) -> Path:
        """Folder of the results."""
        return Path(self.output.dir or f"runs/{self.experiment.name}").expanduser()

    @property
    def calibration_text(self) -> TextSource:
        """Text that calibrates."""
        return _source(self.dataset, self.dataset.split)

    @property
    def mixed_texts(self) -> tuple[TextSource, ...]:
        """Texts that calibrate in equal parts with the calibration text."""
        asked = self.dataset
        if not {"name", "split", "mix"} & asked.model_fields_set:
            return tuple(TextSource(name=name, split="train") for name in self.text_defaults.mixed_with(asked.name))
        return tuple(_source(text, text.split, "train") for text in asked.mix)

    @property
    def evaluation_text(self) -> TextSource:
        """Held-out text: what ``evaluation`` says, and for the same dataset what ``dataset`` says otherwise."""
        asked, base = self.evaluation, self.dataset
        name = asked.name or base.name
        same = name == base.name
        return _source(
            TextSource(
                name=name,
                subset=asked.subset or (base.subset if same else None),
                streaming=(same and base.streaming) if asked.streaming is None else asked.streaming,
                text_field=asked.text_field or (base.text_field if same else None),
                revision=asked.revision or (base.revision if same else None),
            ),
            asked.split,
            held_out_split(name),
        )

    @property
    def evaluation_texts(self) -> tuple[TextSource, ...]:
        """Every held-out text, the main one first."""
        extra = (_source(text, text.split, held_out_split(text.name)) for text in self.evaluation.extra)
        return (self.evaluation_text, *extra)

    @property
    def contextual_text(self) -> SecondText | None:
        """Second text of the contextual block; None for none."""
        asked, extra = self.contextual, self.evaluation.extra if self.evaluation.enabled else ()
        chosen = asked.second or (extra[0] if extra else None)
        if not asked.enabled or chosen is None:
            return None
        return SecondText(**_source(chosen, chosen.split, held_out_split(chosen.name)).model_dump())

    @property
    def generates_samples(self) -> bool:
        """Whether samples are generated: of a streamed model only where the file says so."""
        asked = self.evaluation.samples.enabled
        return self.evaluation.enabled and (self.model.stream is None if asked is None else asked)

    @property
    def task_options(self) -> TaskOptions | None:
        """Downstream tasks to run; None for none."""
        asked = self.evaluation.tasks
        if not (self.evaluation.enabled and asked.names):
            return None
        seed = self.experiment.seed
        return TaskOptions(asked.names, asked.num_fewshot, asked.limit, asked.batch_size, seed)

    @property
    def stability_texts(self) -> tuple[TextSource, ...]:
        """Texts whose cores are compared with that of the calibration."""
        asked = self.supernode.stability
        return tuple(_source(text, text.split) for text in asked.texts) if asked.enabled else ()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric to score, once: those of enabled parts only, the pruning ones first."""
        names = [*self.pruning.algorithms] if self.pruning.enabled else []
        names += [self.supernode.score_metric] if self.supernode.enabled else []
        names += self.metrics.enabled
        names += [name for name in METRICS.names() if name.startswith("scar_") and self.metrics.scar.enabled]
        return tuple(dict.fromkeys(names))

    def metric_arguments(self, name: str) -> dict[str, Any]:
        """Keyword arguments of a metric, checked and converted to the types that it declares."""
        return parse_arguments(METRICS.get(name), self.metrics.params.get(name, {}))


def _source(text: TextSource, split: str | None, default: str | None = None) -> TextSource:
    fields: dict[str, Any] = {key: getattr(text, key) for key in TextSource.model_fields}
    return TextSource.model_validate({**fields, "split": None if text.is_file else split or default})
