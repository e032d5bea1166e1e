"""Temper: fine-tuning of multimodal models on Ascend NPU clusters as a REST service."""

__version__ = "0.1.0"
