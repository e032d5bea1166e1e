"""How a model is split over ranks: MindSpeed-MM's own parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from core.specs.base import Spec

LayerCount = Annotated[int, Field(ge=0, le=1024)]
Chunk = Annotated[tuple[LayerCount, ...], Field(min_length=1, max_length=1024)]
PipelineLayers = Annotated[
    tuple[Chunk, ...],
    Field(
        min_length=1, max_length=64, description="Layers per stage: outer list = virtual chunk, inner = pipeline rank."
    ),
]


class ParallelSpec(Spec):
    """A checkpoint's layout: `tp_size` × pipeline ranks × virtual chunks, with uneven stages over both towers."""

    tp_size: int = Field(1, ge=1, le=64, description="Tensor-parallel ranks.")
    llm_pp_layers: PipelineLayers = Field(examples=[[[12, 16]]])
    vit_pp_layers: PipelineLayers = Field(examples=[[[32, 0]]])

    @model_validator(mode="after")
    def _rectangular(self) -> ParallelSpec:
        shapes = {name: [len(chunk) for chunk in getattr(self, name)] for name in ("llm_pp_layers", "vit_pp_layers")}
        for name, lengths in shapes.items():
            if len(set(lengths)) != 1:
                raise ValueError(f"every chunk of {name} must name the same number of pipeline ranks, got {lengths}")
        if shapes["llm_pp_layers"] != shapes["vit_pp_layers"]:
            raise ValueError(
                f"llm_pp_layers has (chunks × ranks) {shapes['llm_pp_layers']}, vit_pp_layers {shapes['vit_pp_layers']}: "
                "both need one entry per pipeline rank and chunk"
            )
        return self

    @property
    def pp_size(self) -> int:
        """Pipeline ranks."""
        return len(self.llm_pp_layers[0])

    @property
    def vpp_size(self) -> int:
        """Virtual chunks per pipeline rank; 1 = none."""
        return len(self.llm_pp_layers)


class TrainingParallelSpec(ParallelSpec):
    """A layout and the processes that train it; what tp × pp leaves over is data parallel."""

    nnodes: int = Field(1, ge=1, le=4096, description="Hosts.")
    nproc_per_node: int = Field(1, ge=1, le=64, description="Devices, and processes, per host.")

    @model_validator(mode="after")
    def _divides(self) -> TrainingParallelSpec:
        model_size = self.tp_size * self.pp_size
        if self.world_size % model_size:
            raise ValueError(
                f"nnodes × nproc_per_node ({self.world_size}) must be a multiple of tp_size × pipeline ranks ({model_size})"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nnodes * self.nproc_per_node

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def layout(self) -> ParallelSpec:
        """The layout alone."""
        return ParallelSpec(tp_size=self.tp_size, llm_pp_layers=self.llm_pp_layers, vit_pp_layers=self.vit_pp_layers)
