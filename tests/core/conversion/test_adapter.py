"""LoRA adapters: PEFT's folder to rank files of any split and back, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.conversion.adapter import adapter_reshard, adapter_to_hf, adapter_to_mm
from core.conversion.output import Options
from core.conversion.pt import from_torch, write_pt
from core.errors import IncompatiblePlan, InvalidModel, UnknownWeights
from core.models.adapter import ADAPTER_CONFIG, ADAPTER_FILE, inspect_adapter_folder
from core.models.config import Config
from core.models.hf_folder import HFFolder, read_header
from core.models.mm_folder import inspect_mm_folder
from tests.core.conversion.conftest import ONE, SHAPE, TWO_BY_TWO, VIRTUAL, folder_bytes, load, split
from tests.tiny import write_safetensors

TEXT = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SIZES = {
    "self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64), "mlp.down_proj": (64, 96), "attn.proj": (32, 32), "attn.qkv": (96, 32),
}  # fmt: skip
RANK = 4

Write = Callable[..., Path]


@pytest.fixture
def config(source: HFFolder) -> Config:
    return source.config


@pytest.fixture
def write_adapter(tmp_path: Path) -> Write:
    """A PEFT folder of random matrices."""

    def write(
        *,
        text: tuple[str, ...] = TEXT,
        vision: tuple[str, ...] = ("attn.proj",),
        prefix: str = "base_model.model.model.language_model.layers.",
        vision_prefix: str = "base_model.model.model.visual.blocks.",
        **options: object,
    ) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        generator = np.random.default_rng(0)
        tensors = {}
        modules = [(f"{prefix}{layer}.{name}", name) for layer in range(SHAPE.text_layers) for name in text]
        modules += [(f"{vision_prefix}{layer}.{name}", name) for layer in (0, 2) for name in vision]
        for module, name in modules:
            rows, columns = SIZES[name]
            tensors[f"{module}.lora_A.weight"] = generator.standard_normal((RANK, columns), np.float32)
            tensors[f"{module}.lora_B.weight"] = generator.standard_normal((rows, RANK), np.float32)
        write_safetensors(folder / ADAPTER_FILE, tensors)
        peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": list(text), "bias": "none"}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(peft | options, indent=2) + "\n")
        return folder

    return write


class TestThereAndBack:
    @pytest.mark.parametrize(
        ("first", "second"), [(ONE, TWO_BY_TWO), (TWO_BY_TWO, VIRTUAL), (VIRTUAL, ONE)], ids=["join", "deal", "whole"]
    )
    @pytest.mark.parametrize("prefixes", ["new", "old"])
    def test_a_folder_comes_back_as_it_was(
        self, tmp_path: Path, config: Config, write_adapter: Write, first: object, second: object, prefixes: str
    ) -> None:
        old = {"prefix": "base_model.model.model.layers.", "vision_prefix": "base_model.model.visual.blocks."}
        path = write_adapter(**(old if prefixes == "old" else {}))
        adapter_to_mm(inspect_adapter_folder(path, config), tmp_path / "a", first, Options(verify=True))
        source = inspect_mm_folder(tmp_path / "a", first)
        adapter_reshard(source, config, first, tmp_path / "b", second, Options(verify=True))
        adapter_to_hf(inspect_mm_folder(tmp_path / "b"), config, second, tmp_path / "back", Options(verify=True))
        assert folder_bytes(tmp_path / "back") == folder_bytes(path)

    def test_names_and_cuts_are_mindspeeds(self, tmp_path: Path, config: Config, write_adapter: Write) -> None:
        path = write_adapter()
        adapter_to_mm(inspect_adapter_folder(path, config), tmp_path / "mm", TWO_BY_TWO)
        from safetensors.numpy import load_file

        hf = load_file(path / ADAPTER_FILE)
        for tp_rank in range(2):
            model = load(tmp_path / f"mm/release/mp_rank_{tp_rank:02d}_001/model_optim_rng.pt")["model"]
            layer = "base_model.model.model.language_model.layers.1."  # the second stage's first
            mm = "text_decoder.decoder.layers.0."
            for name, source, cut in (
                ("self_attention.q_proj", "self_attn.q_proj", {"B": 0}),
                ("self_attention.linear_proj", "self_attn.o_proj", {"A": 1}),
                ("mlp.gate_proj", "mlp.gate_proj", {"B": 0}),
                ("mlp.linear_fc2", "mlp.down_proj", {"A": 1}),
            ):
                for matrix in "AB":
                    wanted = hf[f"{layer}{source}.lora_{matrix}.weight"]
                    if matrix in cut:
                        wanted = np.split(wanted, 2, axis=cut[matrix])[tp_rank]
                    assert np.array_equal(model[f"{mm}{name}.lora_{matrix}.default.weight"].numpy(), wanted), name
            assert len(model) == 3 * len(TEXT) * 2

    def test_a_trained_checkpoint_without_a_config_gets_one(
        self, tmp_path: Path, config: Config, write_adapter: Write
    ) -> None:
        path = write_adapter(vision=())
        adapter_to_mm(inspect_adapter_folder(path, config), tmp_path / "mm", TWO_BY_TWO)
        shutil.rmtree(tmp_path / "mm/hf")
        source = inspect_mm_folder(tmp_path / "mm")
        with pytest.raises(InvalidModel, match="give lora_alpha"):
            adapter_to_hf(source, config, TWO_BY_TWO, tmp_path / "back")
        adapter_to_hf(source, config, TWO_BY_TWO, tmp_path / "back", lora_alpha=8, base_model="Qwen2.5-VL")
        peft = json.loads((tmp_path / "back" / ADAPTER_CONFIG).read_text())
        assert (peft["r"], peft["lora_alpha"], peft["base_model_name_or_path"]) == (RANK, 8, "Qwen2.5-VL")
        layers = range(SHAPE.text_layers)
        assert peft["target_modules"] == sorted(
            f"model.language_model.layers.{n}.{name}" for n in layers for name in TEXT
        )
        written = {entry.key for entry in read_header(tmp_path / "back" / ADAPTER_FILE)}
        assert written == {entry.key for entry in read_header(path / ADAPTER_FILE)}


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"peft_type": "IA3"}, "only LORA"),
            ({"use_dora": True}, "use_dora is True"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ],
    )
    def test_what_is_not_plain_lora(
        self, config: Config, write_adapter: Write, options: dict[str, object], message: str
    ) -> None:
        with pytest.raises(InvalidModel, match=message):
            inspect_adapter_folder(write_adapter(**options), config)

    def test_a_module_that_the_model_lacks(self, config: Config, write_adapter: Write) -> None:
        path = write_adapter(prefix="base_model.model.model.language_model.layers.7")
        with pytest.raises(UnknownWeights, match=r"model\.layers\.70\.self_attn\.q_proj\.lora_A"):
            inspect_adapter_folder(path, config)

    def test_half_a_pair(self, config: Config, write_adapter: Write) -> None:
        path = write_adapter()
        tensors = {"model.layers.0.mlp.up_proj.lora_A.weight": np.zeros((RANK, 64), np.float32)}
        write_safetensors(path / ADAPTER_FILE, tensors)
        with pytest.raises(UnknownWeights, match="has lora_A, but not its other half"):
            inspect_adapter_folder(path, config)

    def test_the_vision_qkv_of_several_ranks(self, tmp_path: Path, config: Config, write_adapter: Write) -> None:
        source = inspect_adapter_folder(write_adapter(vision=("attn.qkv",)), config)
        with pytest.raises(IncompatiblePlan, match="tp_size=1 only"):
            adapter_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
        adapter_to_mm(source, tmp_path / "mm", split([[1, 3]], [[3, 0]]), Options(verify=True))

    def test_a_wrong_source_parallel(self, tmp_path: Path, config: Config, write_adapter: Write) -> None:
        adapter_to_mm(inspect_adapter_folder(write_adapter(), config), tmp_path / "mm", TWO_BY_TWO)
        with pytest.raises(IncompatiblePlan):
            adapter_to_hf(inspect_mm_folder(tmp_path / "mm"), config, split([[3, 1]], [[3, 0]], 2), tmp_path / "back")

    def test_a_checkpoint_of_whole_weights(self, tmp_path: Path, config: Config) -> None:
        file = tmp_path / "mm/release/mp_rank_00/model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        write_pt(file, {"model": {"text_decoder.output_layer.weight": from_torch(torch.zeros(2, 2))}})
        (tmp_path / "mm/latest_checkpointed_iteration.txt").write_text("release")
        with pytest.raises(UnknownWeights, match="no LoRA matrix"):
            adapter_to_hf(inspect_mm_folder(tmp_path / "mm"), config, ONE, tmp_path / "back")


class TestPeft:
    """What PEFT saves comes back through any split and is loaded by PEFT, with and without its own config."""

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # between PEFT and transformers
    @pytest.mark.parametrize("carries_config", [True, False])
    def test_logits_are_the_same(self, tmp_path: Path, source: HFFolder, carries_config: bool) -> None:
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        ids = torch.arange(5, 25)[None]

        def base() -> torch.nn.Module:
            return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(source.path)  # type: ignore[no-any-return]

        lora = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"])
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), lora).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.1)
            wanted = model(input_ids=ids).logits
            plain = base()(input_ids=ids).logits
        assert (wanted - plain).abs().max() > 0.01
        model.save_pretrained(tmp_path / "saved")

        config = source.config
        adapter_to_mm(inspect_adapter_folder(tmp_path / "saved", config), tmp_path / "a", TWO_BY_TWO)
        if not carries_config:  # as MindSpeed-MM writes it
            shutil.rmtree(tmp_path / "a/hf")
        adapter_reshard(inspect_mm_folder(tmp_path / "a"), config, TWO_BY_TWO, tmp_path / "b", VIRTUAL)
        adapter_to_hf(inspect_mm_folder(tmp_path / "b"), config, VIRTUAL, tmp_path / "back", lora_alpha=8)
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "back").eval()
        before, after = model.state_dict(), loaded.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, wanted)
