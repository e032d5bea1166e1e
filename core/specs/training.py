"""Spec of a training job; names and defaults are MindSpeed-MM's where it has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.specs.base import ArtifactRef, JobInputs, Spec
from core.specs.parallel import TrainingParallelSpec


class OptimizerSpec(Spec):
    """AdamW and its schedule."""

    lr: float = Field(1e-5, gt=0, lt=1, description="Peak learning rate.")
    lr_decay_style: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after warm-up.")
    lr_warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of train_iters for linear warm-up.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay of matrices; norms and biases have none."
    )
    clip_grad: float = Field(1.0, ge=0, description="Limit of the global gradient norm; 0 = no clipping.")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)

    @model_validator(mode="after")
    def _min_below_peak(self) -> OptimizerSpec:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        return self


class FreezeSpec(Spec):
    """Which towers are not trained."""

    vision_encoder: bool = Field(True, description="Freeze the vision encoder.")
    vision_projector: bool = Field(True, description="Freeze the projector (merger).")
    text_decoder: bool = Field(False, description="Freeze the language model.")

    @model_validator(mode="after")
    def _something_trains(self) -> FreezeSpec:
        if self.vision_encoder and self.vision_projector and self.text_decoder:
            raise ValueError("vision_encoder, vision_projector and text_decoder are all frozen: nothing would train")
        return self


class RecomputeSpec(Spec):
    """Activation recomputation of one tower."""

    recompute_granularity: Literal["full", "selective"] = Field(description="Whole layers, or core attention only.")
    recompute_method: Literal["uniform", "block"] | None = Field(None, description="With full: how layers are chosen.")
    recompute_num_layers: int | None = Field(None, ge=1, description="With full: layers per unit, or layers in all.")

    @model_validator(mode="after")
    def _full_needs_method(self) -> RecomputeSpec:
        if self.recompute_granularity == "selective" and (self.recompute_method or self.recompute_num_layers):
            raise ValueError("recompute_method and recompute_num_layers go with recompute_granularity full only")
        return self


class RecomputeSpecs(Spec):
    """Recomputation per tower; absent = none."""

    vision_encoder: RecomputeSpec | None = None
    text_decoder: RecomputeSpec | None = None


class LoraSpec(Spec):
    """Low-rank adapters (Hu et al. 2021) in the towers that are not frozen; whole weights are not trained."""

    r: int = Field(8, ge=1, le=1024, description="Rank of the adapters.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("linear_qkv", "linear_proj"),
        description="Linear layers that get one: linear_qkv, linear_proj, linear_fc1, linear_fc2.",
    )


class CheckpointSpec(Spec):
    """When to save and what to keep."""

    save_interval: int | None = Field(
        None, ge=1, description="Iterations between checkpoints; only the final one if absent."
    )
    keep_last: int = Field(2, ge=1, le=1000, description="Checkpoints kept.")
    save_optim: bool = Field(
        True,
        description="Save optimizer state: 8 bytes per trained parameter, 12 in bf16. False is MindSpeed-MM's --no-save-optim: a "
        "resume then goes on with AdamW's moments at zero and, in bf16, with master weights that are rounded to bfloat16.",
    )
    save_rng: bool = Field(
        True,
        description="Save the random state of every rank. False is MindSpeed-MM's --no-save-rng. No layer draws random numbers while "
        "it trains, so a resume without it is as exact.",
    )
    load_optim: bool = Field(
        True,
        description="With resume_from: go on with its optimizer state. False is MindSpeed-MM's --no-load-optim, with the consequence of "
        "save_optim false. The learning rate follows from the iteration either way.",
    )
    load_rng: bool = Field(
        True,
        description="With resume_from: go on with its random state, if tp, pp and dp are its own. False is MindSpeed-MM's --no-load-rng.",
    )


class TrainingSpec(JobInputs):
    """Fine-tune a model on a data set."""

    model: ArtifactRef = Field(description="Weights to start from: mm or Hugging Face layout.")
    dataset: ArtifactRef = Field(description="Output of a data set job.")
    parallel: TrainingParallelSpec
    train_iters: int = Field(ge=1, le=10_000_000, description="Optimizer steps.")
    global_batch_size: int = Field(ge=1, le=1 << 20, description="Samples per optimizer step, over all ranks.")
    micro_batch_size: int = Field(
        1,
        ge=1,
        le=4096,
        description="With seq_length, the token budget of one forward pass: micro_batch_size × seq_length.",
    )
    seq_length: int = Field(1024, ge=16, le=1 << 20, description="Longest sample, in tokens.")
    optimizer: OptimizerSpec = OptimizerSpec()
    freeze: FreezeSpec = FreezeSpec()
    recompute: RecomputeSpecs = RecomputeSpecs()
    lora: LoraSpec | None = Field(
        None, description="Train adapters instead of whole weights; outputs: checkpoint (merged) and adapter."
    )
    checkpoint: CheckpointSpec = CheckpointSpec()
    resume_from: ArtifactRef | None = Field(
        None, description="A training checkpoint to go on from, with its data position."
    )
    loss_reduction: Literal["token", "sample", "square"] = Field(
        "token",
        description="What counts alike in the loss of a global batch: every target token, every sample, or (square) every sample "
        "by the square root of its number of target tokens.",
    )
    log_interval: int = Field(1, ge=1, description="Iterations per log line and metric point.")
    log_format: Literal["temper", "mindspeed_mm"] = Field(
        "temper", description="The log's line per iteration: the field's usual one, or MindSpeed-MM's in full."
    )
    tensorboard: bool = Field(
        True, description="Write the metrics as TensorBoard event files too; they become the output `tensorboard`."
    )
    seed: int = Field(42, ge=0, lt=1 << 32)
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Compute precision; bf16 keeps fp32 master weights.")

    @model_validator(mode="after")
    def _loads_what_is_given(self) -> TrainingSpec:
        refused = [name for name in ("load_optim", "load_rng") if not getattr(self.checkpoint, name)]
        if refused and self.resume_from is None:
            raise ValueError(
                f"checkpoint.{refused[0]} goes with resume_from only: model gives weights and nothing else, so leave it out"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainingSpec:
        dp = self.parallel.dp_size
        if self.global_batch_size % dp:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of the data-parallel size ({dp})"
            )
        return self
