from core.scheduler.inventory import Device, detect, parse_npu_smi
from core.settings import Settings
from tests.core.npu_smi import ONE_CARD_ALARMS


class TestParseNpuSmi:
    def test_cards_health_and_memory_are_read(self) -> None:
        assert parse_npu_smi(ONE_CARD_ALARMS) == (
            Device(0, "910B3", True, 65536 << 20),
            Device(1, "910B3", False, 65536 << 20),
        )

    def test_nonsense_gives_no_device(self) -> None:
        assert parse_npu_smi("DrvMngGetConsoleLogLevel failed\n| x |\n") == ()


class TestDetect:
    def test_cpu_slots_come_from_the_settings(self) -> None:
        found = detect(Settings(device_kind="cpu", devices=3))
        assert (found.device_kind, [device.id for device in found.devices], found.healthy) == ("cpu", [0, 1, 2], True)

    def test_an_npu_host_without_its_tool_is_unhealthy_and_says_why(self) -> None:
        found = detect(Settings(device_kind="npu"))
        assert not found.healthy
        assert "npu-smi" in (found.reason or "")
