"""Rows that tests begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from core.clock import utcnow
from core.db.models import Artifact, Job, Node
from core.db.session import Database
from core.ids import new_id
from core.jobs import service
from core.jobs.principal import Principal
from core.scheduler.inventory import Device, Inventory
from core.settings import Settings
from core.specs.request import JobRequest
from core.storage.local import Store
from worker.node import report

ADMIN = Principal("key_admin", "admin", "admin")
ALICE = Principal("key_alice", "alice", "user")
BOB = Principal("key_bob", "bob", "user")

QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "max_position_embeddings": 128000,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
}
"""The published shape of Qwen2.5-VL-7B."""

LAYOUT_7B: dict[str, Any] = {"tp_size": 1, "llm_pp_layers": [[12, 16]], "vit_pp_layers": [[32, 0]]}


def request(kind: str, spec: dict[str, Any], **more: Any) -> JobRequest:
    """A job request as the API reads it."""
    return TypeAdapter(JobRequest).validate_python({"kind": kind, "spec": spec, **more})


def submit(
    session: Session, settings: Settings, kind: str, spec: dict[str, Any], *, principal: Principal = ALICE, **more: Any
) -> Job:
    """Submit a job as the API does."""
    return service.submit(
        session,
        settings=settings,
        store=Store(settings.store_dir),
        principal=principal,
        request=request(kind, spec, **more),
    )


def add_node(database: Database, settings: Settings, name: str = "node-a", *, devices: int = 2) -> None:
    """A live CPU host."""
    inventory = Inventory("cpu", tuple(Device(index, "cpu") for index in range(devices)))
    report(database, settings.model_copy(update={"node_name": name}), inventory)


def add_artifact(session: Session, kind: str, metadata: dict[str, Any] | None = None, **changes: Any) -> Artifact:
    """An artifact row; its files matter only to tests that read them."""
    values: dict[str, Any] = {
        "id": new_id("art"),
        "kind": kind,
        "name": kind,
        "owner": ALICE.user,
        "shared": False,
        "path": "/nowhere",
        "size_bytes": 1000,
        "num_files": 1,
        "meta": metadata or {},
        "parents": [],
        "created_at": utcnow(),
    }
    artifact = Artifact(**(values | changes))
    session.add(artifact)
    session.flush()
    return artifact


def hf_7b(session: Session, **changes: Any) -> Artifact:
    """A registered Qwen2.5-VL-7B."""
    return add_artifact(session, "hf_model", {"family": "qwen2_5_vl", "config": QWEN_7B}, **changes)


def dataset_source(session: Session, root: Path) -> Artifact:
    """A folder with annotations."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "a.json").write_text("[]")
    return add_artifact(session, "dataset_source", {}, path=str(root))


def node(session: Session, name: str) -> Node:
    """A host's row."""
    return session.get_one(Node, name)
