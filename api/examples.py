"""Example bodies for `/docs`; the tests post each of them. Ids stand for what the reader has."""

from __future__ import annotations

from typing import Any

_MODEL = "art_01k0a2b3c4d5e6f7g8h9j0kmnp"
_IMAGES = "art_01k0a2b3c4d5e6f7g8h9j0kmnq"
_CONVERSION = "job_01k0a2b3c4d5e6f7g8h9j0kmnr"
_DATASET = "job_01k0a2b3c4d5e6f7g8h9j0kmns"
_TRAINING = "job_01k0a2b3c4d5e6f7g8h9j0kmnt"
_LAYERS = {"llm_pp_layers": [[12, 16]], "vit_pp_layers": [[32, 0]]}

JOBS: dict[str, Any] = {
    "conversion": {
        "summary": "Hugging Face weights to mm weights, split over two pipeline stages",
        "value": {
            "kind": "conversion",
            "spec": {"operation": "hf_to_mm", "source": {"artifact": _MODEL}, "parallel": {"tp_size": 1, **_LAYERS}},
        },
    },
    "dataset": {
        "summary": "LLaVA annotations and images to checked, tokenised rows",
        "value": {
            "kind": "dataset",
            "spec": {
                "source": {"artifact": _IMAGES},
                "annotations": "llava_instruct.json",
                "media_root": "train2017",
                "format": "llava",
                "tokenizer": {"artifact": _MODEL},
                "cutoff_len": 1024,
                "validation_fraction": 0.02,
            },
        },
    },
    "training": {
        "summary": "Fine-tune the language model on eight devices, once conversion and data set are done",
        "value": {
            "kind": "training",
            "name": "first fine-tune",
            "labels": {"team": "vision"},
            "spec": {
                "model": {"job": _CONVERSION},
                "dataset": {"job": _DATASET},
                "parallel": {"nnodes": 1, "nproc_per_node": 8, "tp_size": 1, **_LAYERS},
                "train_iters": 10000,
                "global_batch_size": 192,
                "micro_batch_size": 1,
                "seq_length": 1024,
                "optimizer": {"lr": 1e-5, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.1},
                "freeze": {"vision_encoder": True, "vision_projector": True, "text_decoder": False},
                "checkpoint": {"save_interval": 5000, "keep_last": 2},
            },
        },
    },
    "evaluation": {
        "summary": "The fine-tuned model against its base on the held-out rows",
        "value": {
            "kind": "evaluation",
            "spec": {
                "model": {"job": _TRAINING},
                "base": {"job": _CONVERSION},
                "dataset": {"job": _DATASET},
                "generation": {"max_new_tokens": 32},
                "metrics": ["exact_match"],
            },
        },
    },
    "export": {
        "summary": "The fine-tuned weights back to Hugging Face layout",
        "value": {"kind": "conversion", "spec": {"operation": "mm_to_hf", "source": {"job": _TRAINING}}},
    },
}

REGISTER: dict[str, Any] = {
    "model": {
        "summary": "Base weights on the shared file system",
        "value": {"kind": "hf_model", "path": "/models/Qwen2.5-VL-7B-Instruct", "name": "Qwen2.5-VL 7B"},
    }
}
UPLOAD: dict[str, Any] = {
    "dataset": {
        "summary": "Annotations and images in one archive",
        "value": {"kind": "dataset_source", "filename": "digits.tar", "size_bytes": 10240, "name": "digits"},
    }
}
COMPLETE: dict[str, Any] = {
    "verified": {
        "summary": "With the digest of the whole file",
        "value": {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
    }
}
KEY: dict[str, Any] = {
    "user": {"summary": "A key for a colleague", "value": {"name": "notebook", "user": "ada", "role": "user"}}
}
