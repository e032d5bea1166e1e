"""A process that is killed while it writes checkpoints leaves complete ones only, and the next process goes on from there."""

from __future__ import annotations

import random
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from core.parallel.mesh import Mesh
from core.storage.manifest import hash_file
from core.training.checkpoint import Checkpoints, Facts, Position
from core.training.contents import Contents
from core.training.optimizer import OptimizerState, Piece
from tests.distributed import forkserver

KILLS = 8
NUM_ELEMENTS = 1 << 20


def make_checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, Mesh(), rank_folder="mp_rank_00", keep_last=2)


def save_for_ever(folder: Path, pipe: Connection) -> None:
    """Save one checkpoint after another, each full of its iteration, and tell when one is begun."""
    torch.set_num_threads(1)
    checkpoints = make_checkpoints(folder)
    newest = checkpoints.newest()
    for iteration in count(Facts.read(newest).position.iteration + 1 if newest else 1):
        values = torch.full((NUM_ELEMENTS,), float(iteration))
        state = OptimizerState(iteration, {"a": Piece(0, NUM_ELEMENTS, {"exp_avg": values})})
        facts = Facts(Position(iteration, 8 * iteration), {}, "fp32", 42, "", has_optimizer=True)
        checkpoints.save(facts, Contents({"a": values}, state))
        pipe.send(iteration)


def test_no_kill_leaves_a_partial_checkpoint_under_a_final_name(tmp_path: Path) -> None:
    context, dice, checkpoints = forkserver(), random.Random(1), make_checkpoints(tmp_path)
    for _ in range(KILLS):
        ours, theirs = context.Pipe()
        process = context.Process(target=save_for_ever, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        begun = [ours.recv() for _ in range(dice.randint(1, 3))][-1]
        ours.poll(0 if dice.random() < 0.3 else dice.uniform(0, 0.05))  # some moment of the writing, another each time
        process.kill()
        process.join()
        ours.close()

        complete = {Facts.read(path).position.iteration: path for path in checkpoints.kept()}
        assert max(complete, default=0) >= begun - 1
        for iteration, path in complete.items():
            facts = Facts.read(path)
            assert len(facts.digests) == 2
            assert all(hash_file(path / name) == digest for name, digest in facts.digests.items())
            assert set(dict(checkpoints.load_weights(path))["a"].tolist()) == {float(iteration)}
        tracker = tmp_path / "latest_checkpointed_iteration.txt"
        assert not tracker.exists() or int(tracker.read_text()) in complete

    facts = Facts(Position(10**6, 0), {}, "fp32", 42, "", has_optimizer=False)
    checkpoints.save(facts, Contents({"a": torch.ones(1)}))
    checkpoints.wait()
    assert not list(tmp_path.glob(".iter_*"))
    assert len(checkpoints.kept()) == 2
