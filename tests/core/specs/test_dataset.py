"""What a data set spec refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from core.specs.dataset import DatasetSpec

SPEC: dict[str, Any] = {"source": {"path": "/s"}, "annotations": "a.json", "tokenizer": {"path": "/t"}}


class TestDatasetSpec:
    @pytest.mark.parametrize("kind", ["image", "video"])
    def test_a_minimum_of_pixels_above_the_maximum(self, kind: str) -> None:
        limits = {f"{kind}_min_pixels": 4000, f"{kind}_max_pixels": 3136}
        with pytest.raises(ValidationError, match=rf"{kind}_min_pixels \(4000\) must not exceed {kind}_max_pixels"):
            DatasetSpec.model_validate(SPEC | limits)

    @pytest.mark.parametrize("name", ["annotations", "media_root"])
    @pytest.mark.parametrize("path", ["/etc", "../a", "a/../../b", "a\\b", "a\0b"])
    def test_paths_that_leave_the_source(self, name: str, path: str) -> None:
        with pytest.raises(ValidationError, match="must be a relative path"):
            DatasetSpec.model_validate(SPEC | {name: path})
