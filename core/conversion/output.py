"""What every operation does in the end: check that nothing is lost or used twice, write the files, compare them with their source.

A target folder is empty or absent before, or is a journal's (`core.conversion.journal`), and then what that has finished stays.
After a failure its contents mean nothing. No tensor is ever held whole: a chunk of rows goes from the source's memory map to the target
file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.conversion.apply import Bytes, Findings, WeightSource, chunks, layout_dtype, whole_tensor
from core.conversion.files import OutTensor
from core.conversion.hf import HFWeights, write_safetensors
from core.conversion.journal import Journal
from core.conversion.mm import MMWeights, rank_tree
from core.conversion.pt import write_pt
from core.conversion.verify import check_complete, check_consumed, check_equal
from core.conversion.writing import OutFile, Quiet, SharedWatch, Watch, write_files
from core.errors import Conflict, InvalidModel
from core.models.layout import RankLayout, TensorLayout
from core.models.mapping import Shape
from core.models.mm_folder import RANK_FILE, rank_dir


@dataclass(frozen=True)
class Options:
    """What may be asked of every operation."""

    dtype: str | None = None
    """Cast the weights, rounding to nearest even."""
    verify: bool = False
    """Read the output back from the disk and compare every weight with its source."""
    allow_roots: tuple[Path, ...] = ()
    """Where links of the source's model files may lead."""
    watch: Watch = field(default_factory=Quiet)
    journal: Journal | None = None
    """What an earlier attempt has finished, and where this one notes what it finishes."""


AS_IS = Options()
"""Nothing asked."""


@dataclass(frozen=True)
class Written:
    """What a conversion wrote."""

    num_tensors: int
    total_bytes: int
    dtypes: list[str]
    digests: dict[str, str] = field(repr=False)
    """Path below the target -> SHA-256, of the weight files."""


Tensors = Mapping[str, OutTensor]


@dataclass(frozen=True)
class WeightFile:
    """A file to be written."""

    path: str
    """Below the target, with forward slashes."""
    chunks: tuple[Mapping[str, TensorLayout], ...]
    """Name in the file -> layout; several only in a rank file with virtual chunks."""
    write: Callable[[Path, tuple[Tensors, ...]], str]
    """Writes it; returns its SHA-256."""


def rank_files(ranks: Sequence[RankLayout]) -> list[WeightFile]:
    """The rank files of a release."""
    pp_size = 1 + max(rank.pp_rank for rank in ranks)
    return [
        WeightFile(
            f"{rank_dir('release', rank.tp_rank, rank.pp_rank, pp_size)}/{RANK_FILE}",
            rank.chunks,
            lambda path, chunks: write_pt(path, rank_tree(chunks)),
        )
        for rank in ranks
    ]


def safetensors_file(path: str, layouts: Mapping[str, TensorLayout]) -> WeightFile:
    """One file with one tensor for each key."""
    return WeightFile(path, (layouts,), lambda path, chunks: write_safetensors(path, *chunks))


def write_weights(
    source: WeightSource, shapes: Mapping[str, Shape], files: Sequence[WeightFile], target: Path, options: Options
) -> Written:
    """Check that the files hold all weights of `shapes` (HF name -> shape) once, and write them.

    Raises UnknownWeights, InvalidModel, Conflict for a target with files in it, DiskFull, and what the watch raises.
    """
    layouts = [chunk for file in files for chunk in file.chunks]
    for chunk in layouts:
        check_complete(chunk)
    check_consumed(shapes, (block for chunk in layouts for layout in chunk.values() for block in layout.blocks))
    if isinstance(source, MMWeights):
        check_consumed(shapes, source.blocks())
    if options.journal is None and target.exists() and any(target.iterdir()):
        raise Conflict(f"{target} is not empty; stale rank files would be taken for part of the checkpoint")

    watch = SharedWatch(options.watch)
    outputs: list[OutFile] = []
    tensors: list[OutTensor] = []
    for file in files:
        findings = Findings()
        made = tuple(
            {name: _tensor(name, layout, source, options.dtype, watch, findings) for name, layout in chunk.items()}
            for chunk in file.chunks
        )
        inside = [tensor for chunk in made for tensor in chunk.values()]
        size_bytes = sum(tensor.size_bytes for tensor in inside)
        outputs.append(OutFile(file.path, size_bytes, _writer(file, made), findings))
        tensors += inside
    finished = options.journal.finished if options.journal else {}
    to_verify = [tensor_bytes(name, shape, source, options.dtype) for name, shape in shapes.items() if options.verify]
    watch.begin(
        sum(output.size_bytes for output in outputs) + sum(to_verify),
        to_write=sum(output.size_bytes for output in outputs if output.path not in finished),
    )
    return Written(
        num_tensors=len(tensors),
        total_bytes=sum(tensor.size_bytes for tensor in tensors),
        dtypes=sorted({tensor.dtype for tensor in tensors}),
        digests=write_files(target, outputs, watch, options.journal),
    )


def _writer(file: WeightFile, chunks: tuple[Tensors, ...]) -> Callable[[Path], str]:
    return lambda path: file.write(path, chunks)


def verify_weights(
    source: WeightSource, shapes: Mapping[str, Shape], reopen: Callable[[], MMWeights | HFWeights], options: Options
) -> None:
    """Where it is asked for, compare what was written with its source. Raises VerificationFailed."""
    if options.verify:
        check_equal(shapes, source, reopen(), SharedWatch(options.watch))


def tensor_bytes(name: str, shape: Shape, source: WeightSource, dtype: str | None) -> int:
    """Size that a whole weight will have."""
    layout = whole_tensor(name, shape)
    return OutTensor(dtype or _stored_dtype(name, layout, source), shape, list).size_bytes


def _tensor(
    name: str, layout: TensorLayout, source: WeightSource, dtype: str | None, watch: SharedWatch, findings: Findings
) -> OutTensor:
    stored = _stored_dtype(name, layout, source)

    def stream() -> Iterator[Bytes]:
        for chunk in chunks(layout, source, dtype=dtype, findings=findings):
            yield chunk
            watch.advance(chunk.nbytes)

    return OutTensor(dtype or stored, layout.shape, stream)


def _stored_dtype(name: str, layout: TensorLayout, source: WeightSource) -> str:
    stored = layout_dtype(layout, source)
    if stored is None:
        parts = ", ".join(f"{source} {source.dtype(part)}" for part in {block.source for block in layout.blocks})
        raise InvalidModel(f"{name} would be made of weights of different types: {parts}", hint="give dtype")
    return stored
