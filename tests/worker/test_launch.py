from pathlib import Path

from worker.launch import Launch, Part, command

DIR = Path("/store/jobs/job_1/attempts/1")


def launch(
    *, devices: tuple[int, ...] = (), kind: str = "cpu", nodes: int = 1, rank: int = 0, rendezvous: str | None = None
) -> Launch:
    part = Part(device_kind=kind, devices=devices, num_nodes=nodes, node_rank=rank, rendezvous=rendezvous)
    env = {
        "PATH": "/bin",
        "TEMPER_DATABASE_URL": "postgresql://u:secret@db/x",
        "TEMPER_BROKER_URL": "redis://:secret@r",
    }
    return command(part, DIR, base_env=env, num_cores=8)


class TestCommand:
    def test_one_process_needs_no_torchrun(self) -> None:
        made = launch(devices=(3,))
        assert made.argv[1:] == ("-m", "core.runners", str(DIR))
        assert not made.through_torchrun

    def test_several_devices_go_through_torchrun_on_this_host_alone(self) -> None:
        made = launch(devices=(0, 1))
        assert made.through_torchrun
        assert {"--nproc-per-node=2", "--nnodes=1", "--rdzv-endpoint=localhost:0", "--max-restarts=0"} <= set(made.argv)

    def test_several_hosts_meet_at_the_first(self) -> None:
        made = launch(devices=(0, 1), nodes=2, rank=1, rendezvous="10.0.0.1:4000")
        assert {"--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=4000"} <= set(made.argv)


class TestEnvironment:
    def test_the_runner_sees_its_devices_only(self) -> None:
        assert launch(devices=(4, 5), kind="npu").env["ASCEND_RT_VISIBLE_DEVICES"] == "4,5"
        assert launch(devices=(1,), kind="cuda").env["CUDA_VISIBLE_DEVICES"] == "1"

    def test_npu_presets_are_set_and_the_hosts_own_values_win(self) -> None:
        assert launch(devices=(0,), kind="npu").env["HCCL_CONNECT_TIMEOUT"] == "1200"
        part = Part(device_kind="npu", devices=(0,), num_nodes=1, node_rank=0, rendezvous=None)
        assert (
            command(part, DIR, base_env={"HCCL_CONNECT_TIMEOUT": "7"}, num_cores=8).env["HCCL_CONNECT_TIMEOUT"] == "7"
        )

    def test_secrets_of_the_service_do_not_reach_the_runner(self) -> None:
        assert "secret" not in str(launch().env)

    def test_cores_are_shared_among_the_processes(self) -> None:
        assert launch(devices=(0, 1)).env["OMP_NUM_THREADS"] == "4"
