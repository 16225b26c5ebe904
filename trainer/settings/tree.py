"""The settings of a training run: one frozen tree. The string under each field is its help text.

``trainer.settings.resolve`` fills it and ``trainer.settings.check`` finds mistakes in it. Nothing in this room imports
torch, so help and error messages appear at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from planner.inputs.files import load_model
from planner.inputs.model import ModelSpec
from trainer.settings.flags import short


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where the run is stored, how long it is, and on what it runs."""

    dir: Annotated[str, short("--run-dir")] = "runs/laptop"
    """Folder of this run: checkpoints, metrics.jsonl, plans.jsonl, config.yaml."""
    steps: Annotated[int, short("--steps")] = 120
    """Optimizer steps in all; a resumed run keeps the number it was started with."""
    seed: Annotated[int, short("--seed")] = 1234
    """Seed of the initial weights and of the order of samples."""
    resume: Annotated[bool, short("--resume")] = False
    """Continue from the newest complete checkpoint in the run folder."""
    checkpoint_every: Annotated[int, short("--checkpoint-every")] = 40
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; older ones are deleted."""
    world_size: Annotated[int, short("--world-size")] = 4
    """Processes (ranks); each drives one device."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks; auto takes cuda if there is a device for every rank."""
    dtype: Annotated[Literal["fp32", "bf16"], short("--dtype")] = "fp32"
    """Number format of the computation; weights and optimizer stay fp32."""
    collective_timeout_s: float = 120.0
    """Seconds after which a collective that does not finish ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The decoder. The vocabulary size always comes from the tokenizer."""

    preset: Annotated[str, short("--model")] = "tiny"
    """Name of a built-in model, or a YAML file."""
    num_layers: int | None = None
    """Decoder layers (none: the preset's)."""
    hidden_dim: int | None = None
    """Width of the residual stream (none: the preset's)."""
    ffn_dim: int | None = None
    """Width of the MLP (none: the preset's)."""
    num_query_heads: int | None = None
    """Query heads (none: the preset's)."""
    num_kv_heads: int | None = None
    """Key and value heads; must divide the query heads (none: the preset's)."""
    head_dim: int | None = None
    """Width of one head, even (none: the preset's)."""
    qk_norm: bool | None = None
    """Normalise queries and keys per head (none: the preset's)."""
    tied_head: bool | None = None
    """Share the embedding with the output head (none: the preset's)."""
    rope_theta: float | None = None
    """Base of the rotary position frequencies (none: the preset's)."""
    init_from: Annotated[str | None, short("--init-from")] = None
    """Folder of Hugging Face weights to start from."""
    lora_rank: Annotated[int | None, short("--lora-rank")] = None
    """Rank of LoRA adapters (none: train all weights)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The documents, and how they become samples."""

    path: Annotated[str | None, short("--data")] = None
    """Folder of text, text file, JSONL, glob pattern, token store or .npy (none: Python's own source files)."""
    text_field: str = "text"
    """Key of the text in each JSONL line."""
    tokenizer: Annotated[str | None, short("--tokenizer")] = None
    """A tokenizer.json of the tokenizers library (none: the built-in byte tokenizer)."""
    max_length: Annotated[int, short("--max-length")] = 2048
    """Longest sample, in predicted tokens."""
    over_length: Literal["auto", "split", "drop"] = "auto"
    """What happens to documents longer than max_length. Auto splits them, and drops those of the built-in corpus, whose
    pieces would nearly all be equally long."""
    tokens_per_step: Annotated[int, short("--tokens-per-step")] = 8192
    """Most predicted tokens in one optimizer step, over all ranks."""
    cache_dir: str | None = None
    """Folder for tokenised corpora (none: the user's cache folder)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How ranks share one model. The rest of the world size is the data axis, which the planner divides into groups."""

    tensor_parallel: Annotated[int, short("--tensor-parallel")] = 1
    """Tensor-parallel ranks, which split every layer's weights."""
    pipeline_parallel: Annotated[int, short("--pipeline-parallel")] = 1
    """Pipeline stages, which split the layers."""
    shard_ranks: int | None = None
    """Data ranks that share one copy of the weights; the others hold replicas (none: all share one)."""

    sharding: Literal["gather_once", "zero3"] = "gather_once"
    """gather_once: weights are gathered once per step, and ranks may run different numbers of microbatches. zero3: they
    are gathered for every layer, which needs least memory."""
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which gradients are summed over microbatches and ranks. bf16 (only with --dtype bf16) halves
    their memory and messages, but loses small contributions in steps of many microbatches."""

    def data_ranks(self, world_size: int) -> int:
        """Ranks of the data axis. The world size must be a multiple of tensor times pipeline parallel ranks."""
        return world_size // (self.tensor_parallel * self.pipeline_parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """How steps are planned."""

    strategy: Annotated[str, short("--strategy")] = "adaptive"
    """Planner: adaptive, flexsp, static, hdp, zeppelin, megatron and more; an unknown name lists them all."""
    degree: Annotated[int | None, short("--degree")] = None
    """Ranks per attention group, only with strategy static (none: the best degree)."""
    attention: Annotated[str, short("--attention")] = "auto"
    """How the ranks of a group share attention: auto, ulysses, ring, usp, double_ring, routed_ring, group_cast,
    all_gather."""
    ahead: int = 4
    """How many steps ahead of training the planner works."""
    wait_budget_s: float = 10.0
    """Longest wait of a step for its plan, in seconds; after that the step uses the greedy plan."""
    time_limit_s: float = 5.0
    """Guard on the solver time of one plan, in seconds; max_nodes is the limit that normally applies."""
    relative_gap: float = 0.02
    """Stop solving when the plan is proven to be within this fraction of the optimum."""
    max_nodes: int = 200
    """Most branch-and-bound nodes per solve. It limits work instead of time, so that plans repeat exactly."""
    device_budget: str = "auto"
    """Bytes one device may use, such as '4 GiB'; auto measures."""
    cost: str = "auto"
    """Cost model: a YAML or JSON file; auto measures this machine once and caches the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 5e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of the peak."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to matrices only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest global gradient norm; inf never clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """What happens to saved activations."""

    policy: Annotated[str, short("--memory")] = "auto"
    """Policy: auto (chosen by the plan, microbatch by microbatch, where memory is scarce), keep, recompute (all but
    layer inputs and attention), swap, seco (chunk by chunk, exact), spaco (a sample of the chunks: gradients are
    estimates)."""
    swap_fraction: Annotated[float | None, short("--swap-fraction")] = None
    """With policy swap: fraction of the tokens that is swapped; the rest is recomputed (none: the best fractions by
    measured speeds). Layer inputs and attention outputs are swapped whole."""
    tier: Annotated[str | None, short("--tier")] = None
    """host or disk. With swap and auto: where activations are swapped to (none: host memory on cuda, disk on cpu).
    With seco and spaco: where K/V of earlier chunks and their gradients are stored (none: on the device)."""
    tier_budget: str = "auto"
    """Bytes of the tier that one rank may use, such as '8 GiB'; auto takes what the run may need of what is free."""
    chunk_tokens: Annotated[int | None, short("--chunk-tokens")] = None
    """With seco and spaco: most tokens of one chunk on one rank."""
    sample_fraction: Annotated[float | None, short("--sample-fraction")] = None
    """With spaco: fraction of the chunks whose backward runs."""
    sampling: Literal["bernoulli", "importance", "published"] = "bernoulli"
    """With spaco: independent draws with equal probabilities (bernoulli) or by loss tokens (importance), or the paper's
    fixed number of chunks (published), which is biased."""
    chunk_budget: str = "0"
    """With seco and spaco: bytes of activations of the last chunks that one rank keeps instead of running these chunks
    forward twice, such as '2 GiB'."""
    mlp_chunk_tokens: int = 0
    """Tokens that a layer's MLP processes at once, in forward and backward (0: all tokens of a microbatch). If set,
    only the MLP's input is saved, whatever the policy."""
    static_plan: bool = False
    """On cuda: give memory blocks planned addresses in microbatches of a kind seen before. Replaces torch's caching
    allocator for the whole run; needs a C++ compiler. docs/static_memory.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """What a run records about its speed; longhaul report shows it."""

    spans_every: int | None = None
    """Every how many steps the microbatches of all ranks are timed, in spans.jsonl; 0 never (none: as often as keeps
    the file near 20 MB). Not with pipeline stages."""
    drift_factor: float = 1.5
    """Warn once when microbatches take this many times longer or shorter than predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All settings of a run. A recipe may leave out any field."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


def model_spec(config: TrainConfig, vocab_size: int) -> ModelSpec:
    """The preset with the overrides of ``config.model`` and this vocabulary. Raises SpecError."""
    preset = load_model(config.model.preset)
    names = {field.name for field in dataclasses.fields(ModelSpec)}
    settings = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
    overrides = {name: value for name, value in settings.items() if name in names and value is not None}
    return dataclasses.replace(preset, vocab_size=vocab_size, **overrides)
