"""Reading config.json, flat and nested, and refusing what cannot be."""

from typing import Any

import pytest

from core.errors import InvalidModel
from core.models.config import Config
from core.models.qwen2_5_vl.family import SIZES
from tests.tiny import TinyShape, tiny_config

IDS = {
    "<|endoftext|>": 1,
    "<|im_end|>": 2,
    "<|image_pad|>": 3,
    "<|video_pad|>": 4,
    "<|vision_start|>": 5,
    "<|vision_end|>": 6,
}


def config_json(**changes: Any) -> dict[str, Any]:
    return tiny_config(TinyShape(), vocab_size=64, ids=IDS) | changes


class TestFromHf:
    def test_flat_and_nested_are_the_same(self) -> None:
        flat = Config.from_hf(config_json())
        nested = Config.from_hf(tiny_config(TinyShape(), vocab_size=64, ids=IDS, nested=True))
        assert flat == nested
        assert flat.text.mrope_section == (2, 3, 3)
        assert (flat.image_token_id, flat.vision_end_token_id, flat.dtype) == (3, 6, "float32")

    def test_what_transformers_saves_is_read(self) -> None:
        transformers = pytest.importorskip("transformers")
        saved = transformers.Qwen2_5_VLConfig.from_dict(config_json()).to_dict()
        assert Config.from_hf(saved) == Config.from_hf(config_json())

    def test_real_shape(self, data_dir: Any) -> None:
        import json

        file = data_dir / "model_configs" / "qwen25vl_toy" / "config.json"
        config = Config.from_hf(json.loads(file.read_text()))
        assert config.text.num_key_value_heads == SIZES["3B"].text.num_key_value_heads
        assert config.text.hidden_size == 2048
        assert config.tie_word_embeddings

    def test_kv_heads_default_to_heads(self) -> None:
        assert Config.from_hf(config_json(num_key_value_heads=None)).text.num_key_value_heads == 4


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "llama"}, "model_type is 'llama'"),
            ({"hidden_size": None}, "has no hidden_size"),
            ({"hidden_size": "64"}, "hidden_size is '64', but must be a positive integer"),
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
            ({"num_attention_heads": 5}, "hidden_size is 64, but must be a multiple of num_attention_heads"),
            ({"num_key_value_heads": 3}, "num_key_value_heads is 3, but must be a divisor"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
            ({"use_sliding_window": True}, "use_sliding_window"),
            ({"rope_scaling": {"mrope_section": [2, 2, 2]}}, "rope_scaling.mrope_section"),
            ({"rope_scaling": None}, "mrope_section"),
            ({"vision_config": {"fullatt_block_indexes": "x"}}, "vision_config.fullatt_block_indexes"),
            ({"vision_config": []}, "vision_config is"),
            ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ],
    )
    def test_the_field_is_named(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidModel, match=message):
            Config.from_hf(config_json(**change))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"out_hidden_size": 48}, "vision_config.out_hidden_size is 48, but must be the text hidden_size"),
            ({"fullatt_block_indexes": [7]}, "layer indices below depth"),
            ({"num_heads": 3}, "vision_config.hidden_size is 32"),
            ({"window_size": 50}, "vision_config.window_size is 50"),
            ({"hidden_act": "quick_gelu"}, "vision_config.hidden_act"),
        ],
    )
    def test_the_vision_field_is_named(self, change: dict[str, Any], message: str) -> None:
        vision = config_json()["vision_config"] | change
        with pytest.raises(InvalidModel, match=message):
            Config.from_hf(config_json(vision_config=vision))
