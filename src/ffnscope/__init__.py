"""ffnscope: which FFN channels of a language model carry the loss, and how to remove the others.

The pieces compose as functions: `load_model`, `load_windows`, `calibrate`, `score`, `build_plan`, then `masked`,
`slice_` or `prune_`, and `perplexity` or `compare_plans`. The YAML runner is `ffnscope.run`; `load` is `load_model`.
"""

__version__ = "0.1.0"

from ffnscope.analyze.ablation import Ablation, ablate_channels, joint_change
from ffnscope.analyze.agreement import agreement
from ffnscope.analyze.bootstrap import Bootstrap, bootstrap_statistics
from ffnscope.analyze.concentration import Concentration, concentration
from ffnscope.analyze.core import CoreOverlap, CoreStability, core_overlap, core_stability
from ffnscope.analyze.cross_layer import CrossLayer, cross_layer
from ffnscope.analyze.curves import CurveOptions, measure_curves
from ffnscope.analyze.halo import HaloAnalysis, HaloOptions, halo_analysis
from ffnscope.analyze.levels import CoreRule, calibrate_all
from ffnscope.analyze.measured import CurveRounds, plan_by_curves
from ffnscope.analyze.neighbours import null_channels
from ffnscope.analyze.paired import PairedLoss, paired_losses
from ffnscope.analyze.pipeline import BasePipeline, ChainedFFNPipeline, IsolatedFFNPipeline, PipelineResult
from ffnscope.analyze.probes import Probe, ProbeRow, control_probes, dose_probes, run_probes
from ffnscope.analyze.pruning import plan_and_reconstruct
from ffnscope.analyze.question import Question
from ffnscope.analyze.repeats import Repeat, repeat_scores
from ffnscope.analyze.sample import ChannelSample
from ffnscope.analyze.stability import stability
from ffnscope.analyze.validate import Validation, ValidationOptions, validate
from ffnscope.apply.decilm import save_decilm
from ffnscope.apply.distill import Distillation
from ffnscope.apply.export import prune_, save_model
from ffnscope.apply.gguf_file import save_gguf
from ffnscope.apply.held_out import collect_held_out
from ffnscope.apply.mask import masked
from ffnscope.apply.method import METHODS, Method, reconstruct_plan
from ffnscope.apply.one_shot import compensate_bias, reconstruct
from ffnscope.apply.reconstruction import (
    Reconstruction,
    read_reconstruction,
    reconstruct_,
    reconstructed,
    write_reconstruction,
)
from ffnscope.apply.record import PruningRecord, read_record, recut, write_record
from ffnscope.apply.selfcheck import check_cut
from ffnscope.apply.sequential import SequentialOptions, reconstruct_sequential
from ffnscope.apply.slice import slice_
from ffnscope.apply.sparse_weights import (
    SparseWeights,
    read_sparse_weights,
    sparsified,
    sparsify_,
    write_sparse_weights,
)
from ffnscope.apply.unstructured import dass_weights, magnitude_weights, sparsegpt_weights, wanda_weights
from ffnscope.apply.write_pruned import Destination, reconstruct_to, write_pruned
from ffnscope.calibrate.capture import CaptureOptions, capture, capture_size
from ffnscope.calibrate.captured import Capture, read_capture
from ffnscope.calibrate.collect import PassOptions, calibrate, collect, join_statistics, weights_hash
from ffnscope.calibrate.pack import make_windows
from ffnscope.calibrate.parallel import shared_windows
from ffnscope.calibrate.text import TextSource, load_documents, load_windows
from ffnscope.calibrate.windows import Windows
from ffnscope.errors import FFNScopeError
from ffnscope.evaluate.bench import bench
from ffnscope.evaluate.compare import EvalRow, compare_plans
from ffnscope.evaluate.costs import Work
from ffnscope.evaluate.perplexity import perplexity
from ffnscope.evaluate.samples import generate_samples
from ffnscope.evaluate.speed import BenchOptions, BenchResult
from ffnscope.evaluate.tasks import TaskOptions, TaskRow, compare_tasks, load_tasks
from ffnscope.ffn.load import LoadedModel, ModelSource, load_model
from ffnscope.ffn.offload import materialised
from ffnscope.ffn.projection import weights_of
from ffnscope.ffn.sites import find_sites, select_sites
from ffnscope.ffn.survey import survey
from ffnscope.io import read_plan, read_scores, read_stats, write_plan, write_scores, write_stats
from ffnscope.metrics.own_scorers import scorer
from ffnscope.metrics.scorers import (
    ActivationScorer,
    BaseScorer,
    ModifiedPageRankScorer,
    NormScorer,
    RandomScorer,
    WandaScorer,
    WeightedPageRankScorer,
)
from ffnscope.plan.build import build_plan, diff_plans, top_core
from ffnscope.plan.curves import Curves, read_curves, write_curves
from ffnscope.plan.pruners import BasePruner, GlobalPruner, LocalPruner
from ffnscope.registry import (
    ALLOCATORS,
    METRICS,
    POLICIES,
    PREDICTORS,
    STATISTICS,
    allocator,
    metric,
    policy,
    predictor,
    statistic,
)
from ffnscope.report.page import write_report
from ffnscope.report.ranking import ranking
from ffnscope.report.run_folder import RunFolder, read_run
from ffnscope.scoring import score
from ffnscope.sparse.calibration import Target
from ffnscope.sparse.card import Figure, LossChange, SiteCard, SparsityCard, WantedChannels
from ffnscope.sparse.card_files import read_card, write_card
from ffnscope.sparse.card_options import (
    BytesTarget,
    CardOptions,
    CardTexts,
    Certify,
    ParameterTarget,
    PerplexityTarget,
)
from ffnscope.sparse.certificate import Certificate
from ffnscope.sparse.evaluation import compare_forms
from ffnscope.sparse.fit import fit_card
from ffnscope.sparse.masking import masked_by
from ffnscope.sparse.monitor import MonitorOptions
from ffnscope.sparse.prompts import begin_prompt
from ffnscope.sparse.rule import SelectionRule
from ffnscope.sparse.runtime import unwrap_, wrap_
from ffnscope.sparse.selector import Selector
from ffnscope.sparse.traces import Traces, read_traces
from ffnscope.sparse.tracing import TraceOptions, trace, traces_size
from ffnscope.types import (
    Budget,
    ChannelStats,
    EvalResult,
    FFNSite,
    FFNWeights,
    PruningPlan,
    Scores,
)

load = load_model

__all__ = [
    "POLICIES",
    "PREDICTORS",
    "policy",
    "predictor",
    "Target",
    "Figure",
    "LossChange",
    "SiteCard",
    "SparsityCard",
    "WantedChannels",
    "read_card",
    "write_card",
    "BytesTarget",
    "CardOptions",
    "CardTexts",
    "Certify",
    "ParameterTarget",
    "PerplexityTarget",
    "Certificate",
    "fit_card",
    "masked_by",
    "compare_forms",
    "MonitorOptions",
    "SelectionRule",
    "unwrap_",
    "wrap_",
    "Selector",
    "Traces",
    "read_traces",
    "TraceOptions",
    "trace",
    "traces_size",
    "ALLOCATORS",
    "Destination",
    "METHODS",
    "METRICS",
    "STATISTICS",
    "ActivationScorer",
    "BasePipeline",
    "BasePruner",
    "BaseScorer",
    "Ablation",
    "BenchOptions",
    "BenchResult",
    "Bootstrap",
    "Budget",
    "Capture",
    "CaptureOptions",
    "ChainedFFNPipeline",
    "ChannelSample",
    "ChannelStats",
    "Concentration",
    "CoreOverlap",
    "CoreRule",
    "CoreStability",
    "CrossLayer",
    "CurveOptions",
    "CurveRounds",
    "Curves",
    "Distillation",
    "EvalResult",
    "EvalRow",
    "FFNScopeError",
    "FFNSite",
    "FFNWeights",
    "GlobalPruner",
    "HaloAnalysis",
    "HaloOptions",
    "IsolatedFFNPipeline",
    "LoadedModel",
    "LocalPruner",
    "Method",
    "ModelSource",
    "ModifiedPageRankScorer",
    "NormScorer",
    "PairedLoss",
    "PassOptions",
    "PipelineResult",
    "Probe",
    "ProbeRow",
    "PruningPlan",
    "PruningRecord",
    "Question",
    "RandomScorer",
    "Reconstruction",
    "Repeat",
    "RunFolder",
    "Scores",
    "SequentialOptions",
    "SparseWeights",
    "TaskOptions",
    "TaskRow",
    "TextSource",
    "WandaScorer",
    "WeightedPageRankScorer",
    "Validation",
    "ValidationOptions",
    "Windows",
    "Work",
    "ablate_channels",
    "agreement",
    "allocator",
    "begin_prompt",
    "bench",
    "bootstrap_statistics",
    "build_plan",
    "calibrate",
    "calibrate_all",
    "capture",
    "capture_size",
    "check_cut",
    "collect",
    "collect_held_out",
    "compare_plans",
    "compare_tasks",
    "compensate_bias",
    "control_probes",
    "dose_probes",
    "load_tasks",
    "read_run",
    "reconstruct_to",
    "run_probes",
    "shared_windows",
    "write_report",
    "concentration",
    "core_overlap",
    "core_stability",
    "cross_layer",
    "dass_weights",
    "diff_plans",
    "find_sites",
    "generate_samples",
    "halo_analysis",
    "join_statistics",
    "load",
    "load_documents",
    "load_model",
    "load_windows",
    "joint_change",
    "magnitude_weights",
    "make_windows",
    "masked",
    "materialised",
    "metric",
    "measure_curves",
    "null_channels",
    "paired_losses",
    "perplexity",
    "plan_and_reconstruct",
    "plan_by_curves",
    "prune_",
    "ranking",
    "read_capture",
    "read_curves",
    "read_plan",
    "read_reconstruction",
    "read_record",
    "read_scores",
    "read_sparse_weights",
    "read_stats",
    "reconstruct",
    "reconstruct_",
    "reconstruct_plan",
    "reconstruct_sequential",
    "recut",
    "reconstructed",
    "repeat_scores",
    "save_decilm",
    "save_gguf",
    "save_model",
    "score",
    "scorer",
    "select_sites",
    "slice_",
    "sparsegpt_weights",
    "sparsified",
    "sparsify_",
    "stability",
    "statistic",
    "survey",
    "top_core",
    "validate",
    "wanda_weights",
    "weights_hash",
    "weights_of",
    "write_curves",
    "write_plan",
    "write_pruned",
    "write_reconstruction",
    "write_record",
    "write_scores",
    "write_sparse_weights",
    "write_stats",
]
