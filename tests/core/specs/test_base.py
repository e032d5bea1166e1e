from core.specs import TrainingSpec
from core.specs.base import field_names


class TestFieldNames:
    def test_fields_are_found_through_optional_and_nested_models(self) -> None:
        assert "train_iters" in field_names(TrainingSpec, [])
        assert field_names(TrainingSpec, ["optimizer"])[:2] == ["lr", "lr_decay_style"]
        assert "recompute_method" in field_names(TrainingSpec, ["recompute", "vision_encoder"])

    def test_where_no_object_stands_there_are_none(self) -> None:
        assert field_names(TrainingSpec, ["train_iters"]) == []
        assert field_names(TrainingSpec, ["nonsense", "deeper"]) == []
