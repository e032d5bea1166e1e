"""Whether both forms of a model compute the same: the logits of a few layers, from the source and from what was written.

A Hugging Face folder is run by transformers' own model, rank files by ours (`core.models`). So it is compared what names, permutations and
cuts mean, and not only that bytes went where the mapping says, which `verify` proves of every weight.

    image: patch embedding, first, middle and last vision layer, projector ─┐
    text: embedding ────────────────────────────────────────────────────────┴─ first, middle and last language layer, norm, logits

No matrix is ever held: it is multiplied chunk by chunk, in float32, from where it lies. Only this file and `load.py` need torch, and only
this one transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partialmethod
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.conversion.apply import RELEASE_BYTES, Bytes, cast, row_steps
from core.conversion.hf import HFWeights
from core.conversion.pt import PtFile, PtTensor
from core.conversion.verify import VerificationFailed
from core.device import get_accelerator
from core.errors import UnsupportedOption
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.hf_folder import HFFolder
from core.models.layout import hf_shapes, tied_names
from core.models.mapping import Place, Rename, at_layer, old_name, width
from core.models.mm_folder import MMFolder
from core.models.plan import Column, GateUp, Replicate, ShardRule, Split, stages, whole
from core.models.positions import mrope_positions
from core.models.registry import get_family

TOLERANCE = 1e-4
"""Of the largest logit: the two programs add up in different orders."""
NUM_TEXT = 6
"""Text tokens on either side of the image."""
WINDOWS = 1.5
"""Width and height of the image in attention windows, so that windows and full attention are told apart."""

Tick = Callable[[], None]
"""Called often; raises to end the work."""


@dataclass(frozen=True)
class LogitsReport:
    """What was compared; for the artifact's metadata."""

    vision_layers: list[int]
    language_layers: list[int]
    num_tokens: int
    largest: float
    """largest logit of the source, sign apart"""
    difference: float
    """largest difference"""


class Side(Protocol):
    """A model as it lies on the disk."""

    @property
    def config(self) -> Config:
        """Of the whole model."""

    def logits(self, sample: _Sample, dtype: str | None, tick: Tick) -> Tensor:
        """[T, vocab] of the sampled layers; weights are rounded to `dtype` first."""


def compare_logits(source: Side, output: Side, *, dtype: str | None = None, tick: Tick = lambda: None) -> LogitsReport:
    """Raise VerificationFailed unless both compute the same. `dtype` is the type that the output was cast to."""
    sample = _sample(source.config)
    with torch.no_grad():
        wanted, found = source.logits(sample, dtype, tick), output.logits(sample, None, tick)
    finite = wanted.isfinite()
    largest = float(wanted[finite].abs().max()) if finite.any() else 0.0
    difference = float((wanted - found)[finite].abs().max()) if finite.any() else 0.0
    if not torch.equal(finite, found.isfinite()) or difference > TOLERANCE * largest:
        raise VerificationFailed(
            f"logits of source and output differ by {difference:.3g}, their largest is {largest:.3g} "
            f"(vision layers {sample.vision}, language layers {sample.language})",
            hint="the weights are where the mapping puts them, but mean something else there: please report it",
        )
    return LogitsReport(sample.vision, sample.language, len(sample.input_ids), largest, difference)


@dataclass(frozen=True)
class _Sample:
    """The layers, the config of a model that has only these, and what it is given."""

    vision: list[int]
    language: list[int]
    config: Config
    input_ids: list[int]
    grid: tuple[int, int, int]
    pixel_values_PD: Tensor

    def positions(self) -> Tensor:
        """int64 [3, T]"""
        return mrope_positions(self.input_ids, [self.grid], self.config)

    def of(self, place: Place) -> list[int]:
        """Sampled layers of a place; of places without layers their one, number 0."""
        return {Place.VIT_LAYER: self.vision, Place.LLM_LAYER: self.language}.get(place, [0])


def _sample(config: Config) -> _Sample:
    vision, language = (sorted({0, n // 2, n - 1}) for n in (config.num_vit_layers, config.num_llm_layers))
    tower = config.vision
    reduced = replace(
        config,
        vision=replace(
            tower,
            depth=len(vision),
            fullatt_block_indexes=tuple(i for i, layer in enumerate(vision) if layer in tower.fullatt_block_indexes),
        ),
        text=replace(config.text, num_hidden_layers=len(language)),
    )
    side = max(1, round(WINDOWS * tower.window_size / tower.patch_size / tower.spatial_merge_size))
    grid = (1, side * tower.spatial_merge_size, side * tower.spatial_merge_size)
    generator = torch.Generator().manual_seed(0)
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    text = torch.randint(config.text.vocab_size, (10 * NUM_TEXT,), generator=generator).tolist()
    text = [token for token in text if token not in special]
    image = [config.vision_start_token_id, *[config.image_token_id] * side**2, config.vision_end_token_id]
    return _Sample(
        vision,
        language,
        reduced,
        [*text[:NUM_TEXT], *image, *text[NUM_TEXT : 2 * NUM_TEXT]],
        grid,
        torch.randn(grid[1] * grid[2], tower.patch_dim, generator=generator),
    )


@dataclass(frozen=True)
class _Weight:
    """A tensor as bands of rows, each of pieces that lie side by side; bytes [rows, bytes per row]."""

    bands: list[list[Bytes]]
    stored: str
    wanted: str
    tick: Tick
    release: Callable[[], None]

    def chunks(self) -> Iterator[Tensor]:
        """Runs of whole rows, in order, as float32."""
        unreleased = 0
        for band in self.bands:
            row_bytes = sum(piece.shape[1] for piece in band)
            for start, stop in row_steps(0, band[0].shape[0], row_bytes):
                self.tick()
                yield self._float(start, stop, band)
                unreleased += (stop - start) * row_bytes
                if unreleased >= RELEASE_BYTES:
                    self.release()
                    unreleased = 0
        self.release()

    def whole(self) -> Tensor:
        """All of it: for small ones."""
        return torch.cat(list(self.chunks()))

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows."""
        found: dict[int, Tensor] = {}
        first = 0
        for band in self.bands:
            count = band[0].shape[0]
            for index in set(indices.tolist()):
                if first <= index < first + count:
                    found[index] = self._float(index - first, index - first + 1, band)
            first += count
        self.release()
        return torch.cat([found[index] for index in indices.tolist()])

    def _float(self, start: int, stop: int, band: list[Bytes]) -> Tensor:
        pieces = [cast(cast(piece[start:stop], self.stored, self.wanted), self.wanted, "float32") for piece in band]
        return torch.from_numpy(np.concatenate(pieces, axis=1).view(np.float32))


class _Linear(nn.Module):
    """nn.Linear whose weight stays where it is."""

    def __init__(self, weight: _Weight, bias: _Weight | None) -> None:
        super().__init__()
        self._weight = weight
        self._bias = None if bias is None else bias.whole().flatten()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([F.linear(x, rows) for rows in self._weight.chunks()], dim=-1)
        return out if self._bias is None else out + self._bias


class _Embedding(nn.Module):
    """nn.Embedding likewise."""

    def __init__(self, weight: _Weight) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self._weight.rows(ids.flatten()).unflatten(0, ids.shape)


def _fill(model: nn.Module, weight: Callable[[str], _Weight]) -> None:
    """Give a model its weights by name: small ones are loaded, linear layers and embeddings read theirs when they are called."""
    for name, module in list(model.named_modules()):
        match module:
            case nn.Linear():
                bias = None if module.bias is None else weight(f"{name}.bias")
                _replace(model, name, _Linear(weight(f"{name}.weight"), bias))
            case nn.Embedding():
                _replace(model, name, _Embedding(weight(f"{name}.weight")))
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Parameter(weight(name).whole().view(parameter.shape)))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class HFSide:
    """A Hugging Face folder, run by transformers."""

    def __init__(self, folder: HFFolder) -> None:
        self._folder = folder
        self._weights = HFWeights(folder)
        self._shapes = hf_shapes(folder.config)
        self._tied = tied_names(folder.config)

    @property
    def config(self) -> Config:
        """Of the whole model."""
        return self._folder.config

    def logits(self, sample: _Sample, dtype: str | None, tick: Tick) -> Tensor:
        """[T, vocab] of the sampled layers."""

        def weight(key: str) -> _Weight:
            name = _original(old_name(key), sample)
            name = self._tied.get(name, name)
            shape, stored = self._shapes[name], self._weights.dtype(name)
            (part,) = self._weights.parts(name, (0, shape[0]), (0, width(shape)))
            return _Weight([[part.data]], stored, dtype or stored, tick, self._weights.release)

        model = _transformers_model(self._folder.config_json, sample)
        _fill(model, weight)
        ids = torch.tensor([sample.input_ids])
        logits: Tensor = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=sample.positions()[:, None],
            pixel_values=sample.pixel_values_PD,
            image_grid_thw=torch.tensor([sample.grid]),
            use_cache=False,
        ).logits
        return logits[0]


_LAYER = re.compile(r"(visual\.blocks|model\.layers)\.(\d+)\.")


def _original(name: str, sample: _Sample) -> str:
    """A weight of the small model by the name that it has in the whole one."""

    def number(found: re.Match[str]) -> str:
        layers = sample.vision if found[1].startswith("visual") else sample.language
        return f"{found[1]}.{layers[int(found[2])]}."

    return _LAYER.sub(number, name)


def _transformers_model(config_json: Mapping[str, Any], sample: _Sample) -> nn.Module:
    """Transformers' model of the sampled layers, without its matrices."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = dict(config_json)
    vision = values["vision_config"] = dict(values["vision_config"])
    text = values
    if "text_config" in values:
        text = values["text_config"] = dict(values["text_config"])
    vision |= {"depth": len(sample.vision), "fullatt_block_indexes": list(sample.config.vision.fullatt_block_indexes)}
    text["num_hidden_layers"] = len(sample.language)
    text.pop("layer_types", None)  # one for each layer
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with _matrices_on_meta():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model.eval()


@contextmanager
def _matrices_on_meta() -> Iterator[None]:
    """Linear layers and embeddings are made without memory; whatever else there is (rotary tables, norms) as ever."""
    kinds: tuple[type[Any], ...] = (nn.Linear, nn.Embedding)
    ordinary = [kind.__init__ for kind in kinds]
    for kind in kinds:
        kind.__init__ = partialmethod(kind.__init__, device="meta")
    try:
        yield
    finally:
        for kind, init in zip(kinds, ordinary, strict=True):
            kind.__init__ = init


class MMSide:
    """The rank files of a checkpoint, whatever their split, run by our model."""

    def __init__(self, folder: MMFolder, config: Config, parallel: Split) -> None:
        if get_family(config.family).model is None:
            raise UnsupportedOption(f"verify: no logits to compare: this version cannot run {config.family}")
        self._config, self._parallel = config, parallel
        self._files = {(pp_rank, tp_rank): PtFile(file) for pp_rank, tp_rank, file in folder.rank_files()}

    @property
    def config(self) -> Config:
        """Of the whole model."""
        return self._config

    def logits(self, sample: _Sample, dtype: str | None, tick: Tick) -> Tensor:
        """[T, vocab] of the sampled layers."""
        weights = dict(self._sampled(sample, dtype, tick))
        family = get_family(self._config.family)
        with torch.device("meta"):
            model = family.build(sample.config, whole(sample.config), accelerator=get_accelerator("cpu"))
        _fill(model.eval(), weights.__getitem__)
        batch = PackedBatch(
            input_ids_T=torch.tensor(sample.input_ids),
            position_ids_3T=sample.positions(),
            targets_T=torch.full((len(sample.input_ids),), -100),
            cu_seqlens=(0, len(sample.input_ids)),
            pixel_values_PD=sample.pixel_values_PD,
            grid_thw=(sample.grid,),
            rows=(0,),
        )
        tied = self._config.tie_word_embeddings
        head = "text_decoder.embedding.word_embeddings" if tied else "text_decoder.output_layer"
        logits: Tensor = _Linear(weights[f"{head}.weight"], None)(model(batch))
        return logits

    def _sampled(self, sample: _Sample, dtype: str | None, tick: Tick) -> Iterator[tuple[str, _Weight]]:
        """(name in the small model, weight), by the names of the rank files."""
        family = get_family(self._config.family)
        tied = self._config.tie_word_embeddings
        pp_size, num_chunks = len(self._parallel.llm_pp_layers[0]), len(self._parallel.llm_pp_layers)
        for stage in stages(self._config, self._parallel):
            chunk, pp_rank = divmod(stage.index, pp_size)
            files = [self._files[pp_rank, tp_rank] for tp_rank in range(self._parallel.tp_size)]
            models = [file.tree["model" if num_chunks == 1 else f"model{chunk}"] for file in files]
            for rule in family.mapping:
                for local, layer in enumerate(stage.layers(rule.place)):
                    name = at_layer(rule.mm, local)
                    if layer not in sample.of(rule.place) or (isinstance(rule, Rename) and rule.tied_to and tied):
                        continue
                    if name not in models[0]:
                        raise UnsupportedOption("verify: no logits to compare: Temper cannot run the canonical layout")
                    tensors: list[PtTensor] = [model[name] for model in models]
                    stored = tensors[0].dtype
                    bands = _bands([tensor.matrix for tensor in tensors], family.plan[rule.mm])
                    weight = _Weight(bands, stored, dtype or stored, tick, self._release)
                    yield at_layer(rule.mm, sample.of(rule.place).index(layer)), weight

    def _release(self) -> None:
        for file in self._files.values():
            file.release()


def _bands(ranks: list[Bytes], rule: ShardRule) -> list[list[Bytes]]:
    """How the slices of tensor-parallel ranks are used together."""
    match rule:
        case Replicate():
            return [[ranks[0]]]
        case Column():
            return [ranks]
        case GateUp():
            halves = [np.split(rank, 2) for rank in ranks]
            return [[half[part]] for part in range(2) for half in halves]
        case _:
            return [[rank] for rank in ranks]
