"""A tiny random Qwen2.5-VL twice, as transformers' model and as ours on the same weights, and batches for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from core.device.cpu import CpuAccelerator
from core.models import plan
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.layers.recompute import Recompute
from core.models.mapping import Rename, Rows, at_layer, old_name
from core.models.plan import Stage
from core.models.positions import mrope_positions
from core.models.qwen2_5_vl import family
from core.models.qwen2_5_vl.model import Qwen2_5_VLStage

VISION_START, VISION_END, IMAGE, VIDEO = 90, 91, 92, 93

TINY: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": False,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 4,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "in_channels": 3,
        "in_chans": 3,
        "patch_size": 4,
        "spatial_patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 32,
        "tokens_per_second": 2,
        "hidden_act": "silu",
    },
}
"""Windows of 4 x 4 merged patches, as the real model has."""


@dataclass(frozen=True)
class Sample:
    """Token ids with placeholders, and the patches of images and videos (t above 1) in order of appearance."""

    input_ids: list[int]
    pixel_values_PD: Tensor
    grid_thw: tuple[tuple[int, int, int], ...]
    seconds_per_grid: tuple[float, ...] = ()


def tiny_config(*, tied: bool = False) -> dict[str, Any]:
    return TINY | {"tie_word_embeddings": tied}


def hf_model(config_json: dict[str, Any], *, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Weights are drawn wide, biases and norms included, so that no part of the model hides behind zeros and ones."""
    config = Qwen2_5_VLConfig(**config_json)
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(spread + 1.0 if parameter.ndim == 1 and "bias" not in name else spread)
    return model.eval()


def our_stage(
    config: Config,
    stage: Stage,
    reference: Qwen2_5_VLForConditionalGeneration,
    *,
    recompute: Recompute | None = None,
) -> Qwen2_5_VLStage:
    """`stage` with the weights of `reference`."""
    model = Qwen2_5_VLStage(config, stage, accelerator=CpuAccelerator(), recompute=recompute)
    model.load_state_dict(
        mm_state(config, stage, {key: value.detach() for key, value in reference.state_dict().items()})
    )
    return model


def whole_model(config: Config, reference: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLStage:
    return our_stage(config, plan.whole(config), reference)


def mm_state(config: Config, stage: Stage, hf_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """HF weights (or gradients) as the mm tensors of a stage, by the family's own mapping."""
    source = {old_name(name): tensor for name, tensor in hf_tensors.items()}
    dims = config.dims()
    state: dict[str, Tensor] = {}
    for rule in family.MAPPING:
        mm_shape = rule.mm_shape(dims)
        for local, layer in enumerate(stage.layers(rule.place) or ()):
            rows = list(rule.rows(dims))
            if isinstance(rule, Rename) and rule.tied_to is not None and config.tie_word_embeddings:
                if stage.has_embedding:
                    continue
                rows = [Rows(0, rule.tied_to, 0, mm_shape[0])]
            parts = [source[at_layer(r.source, layer)].narrow(0, r.source_row, r.count) for r in rows]
            state[at_layer(rule.mm, local)] = torch.cat(parts).reshape(mm_shape)
    return state


def make_sample(parts: Sequence[int | tuple[int, ...]], *, seed: int = 0, seconds: float = 1.0) -> Sample:
    """A number stands for that many random text tokens, a pair for an image of that many (rows, columns) of patches, a
    triple for a video of that many (steps, rows, columns), `seconds` from step to step.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    grids: list[tuple[int, int, int]] = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, VISION_START, (part,), generator=generator).tolist()
        else:
            t, h, w = part if len(part) == 3 else (1, *part)
            ids += [VISION_START, *[VIDEO if len(part) == 3 else IMAGE] * (t * h * w // 4), VISION_END]
            grids.append((t, h, w))
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
    return Sample(ids, pixels, tuple(grids), tuple(seconds * (t > 1) for t, _, _ in grids))


def pack(samples: Sequence[Sample], config: Config) -> PackedBatch:
    cu_seqlens = [0]
    for sample in samples:
        cu_seqlens.append(cu_seqlens[-1] + len(sample.input_ids))
    return PackedBatch(
        input_ids_T=torch.tensor([token for sample in samples for token in sample.input_ids]),
        position_ids_3T=torch.cat(
            [mrope_positions(s.input_ids, s.grid_thw, config, s.seconds_per_grid) for s in samples], dim=1
        ),
        targets_T=torch.tensor([token for s in samples for token in [*s.input_ids[1:], -100]]),
        cu_seqlens=tuple(cu_seqlens),
        pixel_values_PD=torch.cat([sample.pixel_values_PD for sample in samples]),
        grid_thw=tuple(grid for sample in samples for grid in sample.grid_thw),
        rows=tuple(range(len(samples))),
    )


def hf_inputs(sample: Sample) -> dict[str, Tensor]:
    """Keyword arguments of transformers' model for one sample."""
    ids = torch.tensor([sample.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = sample.pixel_values_PD[: sum(t * h * w for t, h, w in sample.grid_thw)]
    parts = pixels.split([t * h * w for t, h, w in sample.grid_thw]) if sample.grid_thw else ()
    images = [part for part, grid in zip(parts, sample.grid_thw, strict=True) if grid[0] == 1]
    videos = [part for part, grid in zip(parts, sample.grid_thw, strict=True) if grid[0] > 1]
    if images:
        inputs["pixel_values"] = torch.cat(images)
        inputs["image_grid_thw"] = torch.tensor([grid for grid in sample.grid_thw if grid[0] == 1])
    if videos:
        inputs["pixel_values_videos"] = torch.cat(videos)
        inputs["video_grid_thw"] = torch.tensor([grid for grid in sample.grid_thw if grid[0] > 1])
        inputs["second_per_grid_ts"] = torch.tensor([second for second in sample.seconds_per_grid if second])
    if images or videos:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs
