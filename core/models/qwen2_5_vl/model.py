"""Qwen2.5-VL as pipeline stages, with the parameter names of MindSpeed-MM's checkpoint; one stage can be all of it.

    pixel_values ─► patch_embed ─► vision layers ─► projector ─┐
    input_ids ───► word_embeddings ────────────────────────────┴─► decoder layers ─► final_layernorm

A stage holds a consecutive part of that line and hands on what the next one needs (`outgoing_shape`).
Shapes: T tokens, P patches, M = P / merge ** 2 image features, H and V hidden size of decoder and encoder,
N rows, D values of a patch or of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from core.device.base import Accelerator
from core.device.sending import send
from core.models.batch import PackedBatch
from core.models.config import Config, TextConfig, VisionConfig
from core.models.layers.blocks import AttentionContext, RMSNorm, TransformerLayer
from core.models.layers.cache import KVCache
from core.models.layers.linear import linear
from core.models.layers.recompute import Recompute, RecomputePolicy, run_layers
from core.models.layers.rope import mrope_tables, vision_tables
from core.models.layers.vision import PatchEmbed, PatchMerger, patch_layout
from core.models.plan import Stage

VISION_EPS = 1e-6
"""The vision encoder's RMSNorm epsilon: a constant of the family, not in its config."""


def outgoing_shape(config: Config, stage: Stage, num_tokens: int, num_patches: int) -> tuple[int, int]:
    """Shape of what `stage` hands to the next one for a batch of these sizes."""
    if stage.has_embedding or stage.llm_layers:
        return num_tokens, config.text.hidden_size
    if stage.has_projector:
        return num_patches // config.vision.spatial_merge_size**2, config.vision.out_hidden_size
    return num_patches, config.vision.hidden_size


class Qwen2_5_VLStage(nn.Module):
    """One pipeline stage. Every parameter gets a gradient whatever the batch, also from a batch without images."""

    def __init__(
        self, config: Config, stage: Stage, *, accelerator: Accelerator, recompute: Recompute | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.stage = stage
        self.accelerator = accelerator
        policies = recompute or Recompute()
        self.image_encoder: ImageEncoder | None = None
        self.text_decoder: TextDecoder | None = None
        if stage.vit_layers or stage.has_projector:
            self.image_encoder = ImageEncoder(config.vision, stage, accelerator, policies.vision_encoder)
        if stage.llm_layers or stage.has_embedding or stage.has_output:
            self.text_decoder = TextDecoder(config, stage, accelerator, policies.text_decoder)

    def forward(
        self,
        batch: PackedBatch,
        incoming: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        """`incoming` is the previous stage's output (None on the first); `rows_N` are the positions whose final hidden states
        are wanted of the last stage (None: all). Of the others its last layer computes keys and values only.

        Returns patches [P, V] while the encoder goes on in the next stage, image features [M, H] where the encoder ends
        and the decoder has not begun, hidden states [T, H] after that; on the last stage those after the final norm, of
        the rows that were asked for.
        """
        x = incoming
        if self.image_encoder is not None:
            x = self.image_encoder(batch, x)
        if self.text_decoder is not None:
            x = self.text_decoder(batch, x, cache, rows_N)
        assert x is not None, "a stage holds at least one layer"
        return x

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Scores over the vocabulary [N, vocab] for rows of the last stage's output."""
        return linear(hidden_NH, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """The output matrix [vocab, H] of the last stage: its own, or the embedding when both are tied and live here."""
        decoder = self.text_decoder
        assert decoder is not None, "only the last stage has an output layer"
        if decoder.output_layer is not None:
            return decoder.output_layer.weight
        assert decoder.embedding is not None, "only the last stage has an output layer"
        return decoder.embedding.word_embeddings.weight


class ImageEncoder(nn.Module):
    """The stage's part of the vision tower. Patches travel between its layers and stages in window order."""

    def __init__(
        self, config: VisionConfig, stage: Stage, accelerator: Accelerator, recompute: RecomputePolicy
    ) -> None:
        super().__init__()
        self.config = config
        self.stage = stage
        self.recompute = recompute
        self.encoder = VisionLayers(config, stage, accelerator)
        self.projector: PatchMerger | None = None
        if stage.has_projector:
            self.projector = PatchMerger(
                config.hidden_size, config.out_hidden_size, config.spatial_merge_size, accelerator
            )

    def forward(self, batch: PackedBatch, patches_PV: Tensor | None) -> Tensor:
        if batch.num_patches == 0 and not torch.is_grad_enabled():
            return self._nothing()  # while generating, all but the first pass are without images
        layout = patch_layout(
            batch.grid_thw,
            merge_size=self.config.spatial_merge_size,
            window_size=self.config.window_size,
            patch_size=self.config.patch_size,
        )
        device = batch.pixel_values_PD.device
        if self.encoder.patch_embed is not None:
            patches_PV = self.encoder.patch_embed(batch.pixel_values_PD).index_select(0, send(layout.order_P, device))
        assert patches_PV is not None, "a later vision stage needs the patches of the one before"

        head_dim = self.config.hidden_size // self.config.num_heads
        cos_PD, sin_PD = vision_tables(send(layout.positions_P2, device), head_dim=head_dim)
        selective = self.recompute.granularity == "selective" and torch.is_grad_enabled()
        layers = [
            partial(
                layer,
                context=AttentionContext(
                    cos_PD,
                    sin_PD,
                    layout.cu_frames if index in self.config.fullatt_block_indexes else layout.cu_windows,
                    causal=False,
                    recompute_core=selective,
                ),
            )
            for index, layer in zip(self.stage.vit_layers, self.encoder.blocks.layers, strict=True)
        ]
        patches_PV = run_layers(layers, patches_PV, self.recompute)
        if self.projector is None:
            return patches_PV
        return self.projector(patches_PV).index_select(0, send(layout.restore_M, device))

    def _nothing(self) -> Tensor:
        width = self.config.hidden_size if self.projector is None else self.config.out_hidden_size
        return next(self.parameters()).new_zeros(0, width)


class VisionLayers(nn.Module):
    def __init__(self, config: VisionConfig, stage: Stage, accelerator: Accelerator) -> None:
        super().__init__()
        self.patch_embed: PatchEmbed | None = None
        if stage.has_patch_embed:
            self.patch_embed = PatchEmbed(
                config.in_channels, config.temporal_patch_size, config.patch_size, config.hidden_size
            )
        self.blocks = LayerList(
            TransformerLayer(
                config.hidden_size,
                num_heads=config.num_heads,
                num_groups=config.num_heads,
                ffn_size=config.intermediate_size,
                eps=VISION_EPS,
                proj_bias=True,
                mlp_bias=True,
                accelerator=accelerator,
            )
            for _ in stage.vit_layers
        )


class LayerList(nn.Module):
    """`layers.N`, N counting from 0 in each stage."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TextDecoder(nn.Module):
    """The stage's part of the language model."""

    def __init__(self, config: Config, stage: Stage, accelerator: Accelerator, recompute: RecomputePolicy) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        text = config.text
        self.embedding: Embedding | None = None
        self.output_layer: nn.Linear | None = None
        if stage.has_embedding:
            self.embedding = Embedding(text)
        self.decoder = DecoderLayers(text, stage, accelerator)
        if stage.has_output and not (config.tie_word_embeddings and stage.has_embedding):
            self.output_layer = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def forward(
        self, batch: PackedBatch, incoming: Tensor | None, cache: KVCache | None, rows_N: Tensor | None
    ) -> Tensor:
        hidden_TH = incoming
        if self.embedding is not None:
            hidden_TH = self.embedding.word_embeddings(batch.input_ids_T)
            if incoming is not None:
                is_image_T = batch.input_ids_T == self.config.image_token_id
                is_video_T = batch.input_ids_T == self.config.video_token_id
                hidden_TH = _place_features(hidden_TH, incoming, is_image_T | is_video_T)
        assert hidden_TH is not None, "a later decoder stage needs the hidden states of the one before"

        text = self.config.text
        cos_TD, sin_TD = mrope_tables(
            batch.position_ids_3T,
            head_dim=text.head_dim,
            theta=text.rope_theta,
            sections=text.mrope_section,
            dtype=hidden_TH.dtype,
        )
        context = AttentionContext(
            cos_TD,
            sin_TD,
            batch.cu_seqlens,
            causal=True,
            recompute_core=self.recompute.granularity == "selective" and torch.is_grad_enabled(),
            cache=cache,
        )
        last = len(self.decoder.layers) - 1
        layers = [
            partial(layer, context=context._replace(layer=index, rows_N=rows_N if index == last else None))
            for index, layer in enumerate(self.decoder.layers)
        ]
        if rows_N is not None and not layers:
            hidden_TH = hidden_TH.index_select(0, rows_N)
        hidden_TH = run_layers(layers, hidden_TH, self.recompute)
        return hidden_TH if self.decoder.final_layernorm is None else self.decoder.final_layernorm(hidden_TH)


class Embedding(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)


class DecoderLayers(nn.Module):
    def __init__(self, config: TextConfig, stage: Stage, accelerator: Accelerator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.hidden_size,
                num_heads=config.num_attention_heads,
                num_groups=config.num_key_value_heads,
                ffn_size=config.intermediate_size,
                eps=config.rms_norm_eps,
                proj_bias=False,
                mlp_bias=False,
                accelerator=accelerator,
            )
            for _ in stage.llm_layers
        )
        self.final_layernorm: RMSNorm | None = None
        if stage.has_output:
            self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, accelerator)


def _place_features(embedded_TH: Tensor, features_MH: Tensor, is_media_T: Tensor) -> Tensor:
    """Put the features, in order, where the image and video tokens are: by gather and select, so that no count leaves the device."""
    features_MH = features_MH.to(embedded_TH.dtype)
    if features_MH.shape[0] == 0:
        # Keeps the encoder in the graph of a text-only batch, so that its parameters get zero gradients instead of none.
        return embedded_TH + features_MH.sum() * 0 if features_MH.requires_grad else embedded_TH
    # As integers: what counts on an NPU (aclnnCumsum) takes no booleans.
    feature_T = (is_media_T.int().cumsum(0, dtype=torch.int32) - 1).clamp(0, features_MH.shape[0] - 1)
    return torch.where(is_media_T[:, None], features_MH.index_select(0, feature_T), embedded_TH)
