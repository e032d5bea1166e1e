"""Errors of devices that have no class of their own."""

from __future__ import annotations

import pytest
import torch

from core.device.failing import is_out_of_memory


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            # As torch_npu 2.7.1 raises it.
            RuntimeError(
                "NPU out of memory. Tried to allocate 5.03 GiB (NPU 3; 60.96 GiB total capacity; 1.32 GiB free)"
            ),
        ],
    )
    def test_is_known_by_class_or_by_words(self, error: RuntimeError) -> None:
        assert is_out_of_memory(error)

    def test_the_cpus_is_known(self) -> None:
        with pytest.raises(RuntimeError) as raised:
            torch.empty(1 << 50, dtype=torch.uint8)
        assert is_out_of_memory(raised.value)

    def test_another_error_is_none(self) -> None:
        with pytest.raises(RuntimeError) as raised:
            torch.ones(2) @ torch.ones(3)
        assert not is_out_of_memory(raised.value)
