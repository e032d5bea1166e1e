"""`temper doctor` names the first layer that is wrong and the command that mends it.

The folders and outputs are written here, from the documented form of the Ascend stack; no Ascend host took part.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from core.doctor import ASCEND, SUPPORTED, Host, examine, look, npu_count, version_in
from tests.core.npu_smi import TWO_CARDS

GOOD = Host(
    npu_smi=TWO_CARDS,
    driver="25.2.0",
    firmware="25.2.0",
    toolkit="8.2.RC1",
    kernels="8.2.RC1",
    nnal="8.2.RC1",
    toolkit_sourced=True,
    nnal_sourced=True,
    python="3.10",
    torch="2.7.1",
    torch_npu="2.7.1",
)


class TestExamine:
    def test_a_complete_host_passes_every_check(self) -> None:
        report = examine(GOOD)
        assert report.first_wrong is None
        names = [check.name for check in report.checks]
        assert names == ["driver", "firmware", "toolkit", "kernels", "nnal", "python", "torch", "torch_npu"]
        assert {check.verdict for check in report.checks} == {"ok"}

    @pytest.mark.parametrize(
        ("change", "layer", "says", "remedy"),
        [
            ({"npu_smi": None}, "driver", "not installed", "npu-driver_25.2.0_linux-aarch64.run --full --force"),
            ({"npu_smi_failed": True}, "driver", "does not see the cards", "uninstall every driver completely"),
            ({"npu_smi": "no table"}, "driver", "does not see the cards", "uninstall every driver completely"),
            ({"driver": "24.1.0"}, "driver", "24.1.0 is older than 25.2.0", "uninstall it completely"),
            ({"firmware": None}, "firmware", "not installed", "npu-firmware_*.run --full"),
            ({"firmware": "24.1.0"}, "firmware", "not of one Ascend HDK release", "both from one release"),
            ({"toolkit": None}, "toolkit", "not installed", "cann-toolkit_8.2.RC1_linux-aarch64.run --install"),
            ({"toolkit": "8.0.RC3"}, "toolkit", "8.0.RC3 is not a version", "cann-toolkit_8.2.RC1"),
            ({"toolkit_sourced": False}, "toolkit", "not set in this shell", "ascend-toolkit/set_env.sh"),
            ({"kernels": None}, "kernels", "come after the toolkit", "cann-kernels-910b_8.2.RC1"),
            ({"kernels": "8.1.RC1"}, "kernels", "different CANN releases", "cann-kernels-910b_8.2.RC1"),
            ({"nnal": None}, "nnal", "come after the toolkit", "cann-nnal_8.2.RC1"),
            ({"nnal_sourced": False}, "nnal", "not set in this shell", "nnal/atb/set_env.sh"),
            ({"python": "3.12"}, "python", "no matching torch_npu", "environment of Python 3.10"),
            ({"torch": None}, "torch", "not installed", "pip install torch==2.7.1"),
            ({"torch": "2.13.0"}, "torch", "needs torch 2.7.1", "pip install torch==2.7.1"),
            ({"torch_npu": None}, "torch_npu", "not installed", "pip install torch_npu==2.7.1"),
            ({"torch_npu": "2.13.0"}, "torch_npu", "does not go with CANN 8.2.RC1", "pip install torch_npu==2.7.1"),
            ({"torch_npu_error": "libhccl.so"}, "torch_npu", "does not import: libhccl.so", "set_env.sh"),
        ],
    )
    def test_each_fault_is_named_with_its_remedy(self, change: dict, layer: str, says: str, remedy: str) -> None:
        wrong = examine(replace(GOOD, **change)).first_wrong
        assert wrong is not None
        assert wrong.name == layer
        assert says in wrong.problem
        assert remedy in wrong.remedy

    def test_the_lowest_of_several_faults_comes_first(self) -> None:
        wrong = examine(replace(GOOD, torch=None, nnal=None, firmware=None)).first_wrong
        assert wrong is not None
        assert wrong.name == "firmware"

    @pytest.mark.parametrize("version", ["2.7.1", "2.7.1+cpu", "2.7.1.post11"])
    def test_a_build_of_the_right_version_passes(self, version: str) -> None:
        assert examine(replace(GOOD, torch=version, torch_npu=version)).first_wrong is None

    def test_a_newer_driver_passes(self) -> None:
        assert examine(replace(GOOD, driver="25.3.0", firmware="25.3.0")).first_wrong is None


class TestLook:
    def test_versions_are_read_from_a_stack_on_disk(self, tmp_path: Path) -> None:
        write(tmp_path / "driver/version.info", "Version=25.2.0\nascendhal_version=7.35.23\npackage_version=25.2.0\n")
        write(tmp_path / "firmware/version.info", "Version=7.7.0.6.236\nfirmware_version=1.0\npackage_version=25.2.0\n")
        toolkit = tmp_path / "ascend-toolkit/8.2.RC1"
        write(
            toolkit / "aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\n"
        )
        write(toolkit / "opp_kernel/version.info", "Version=8.2.RC1\nversion_dir=8.2.RC1\n")
        (tmp_path / "ascend-toolkit/latest").symlink_to(toolkit)
        write(tmp_path / "nnal/atb/latest/version.info", "    Ascend-cann-atb : 8.2.RC1\n    Platform : aarch64\n")
        host = look(tmp_path)
        assert (host.driver, host.firmware) == ("25.2.0", "25.2.0")
        assert (host.toolkit, host.kernels, host.nnal) == ("8.2.RC1", "8.2.RC1", "8.2.RC1")

    def test_a_host_without_any_of_it_is_told_to_begin_with_the_driver(self, tmp_path: Path) -> None:
        wrong = examine(replace(look(tmp_path), npu_smi=None)).first_wrong
        assert wrong is not None
        assert wrong.name == "driver"

    def test_a_file_without_a_version_counts_as_missing(self, tmp_path: Path) -> None:
        write(tmp_path / "version.info", "nothing of use\n")
        assert version_in(tmp_path / "version.info") is None


class TestNpuCount:
    def test_cards_are_counted_once_each(self) -> None:
        assert npu_count(TWO_CARDS) == 2


class TestSupported:
    def test_the_default_root_and_every_row_are_complete(self) -> None:
        assert Path("/usr/local/Ascend") == ASCEND
        assert all(row.cann and row.torch and row.torch_npu and row.pythons and row.driver for row in SUPPORTED)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
