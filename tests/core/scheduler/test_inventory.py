from core.scheduler.inventory import Device, detect, parse_npu_smi
from core.settings import Settings

# Written by us from the documented form of `npu-smi info` (two 910B cards, the second with an alarm).
NPU_SMI_INFO = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 97.3        45                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3392 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | Alarm         | 94.0        44                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3392 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 12345         | python                   | 3100                    |
+===========================+===============+====================================================+
"""


class TestParseNpuSmi:
    def test_cards_health_and_memory_are_read(self) -> None:
        assert parse_npu_smi(NPU_SMI_INFO) == (
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
