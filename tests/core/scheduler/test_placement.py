from hypothesis import given
from hypothesis import strategies as st

from core.scheduler.placement import FreeNode, Need, Refusal, choose, offers_devices

NODES = st.lists(
    st.builds(
        FreeNode,
        name=st.text("abc", min_size=1, max_size=4),
        devices=st.sets(st.integers(0, 15), max_size=8).map(lambda ids: tuple(sorted(ids))),
        host_slots=st.integers(0, 3),
        drained=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda node: node.name,
)


class TestChoose:
    @given(NODES, st.integers(1, 4), st.integers(0, 8))
    def test_gives_exactly_what_is_needed_from_what_is_free_or_refuses(
        self, free: list[FreeNode], nodes: int, devices: int
    ) -> None:
        chosen = choose(Need(nodes, devices), free)
        fits = [
            node
            for node in free
            if not node.drained and (len(node.devices) >= devices if devices else node.host_slots > 0)
        ]
        if len(fits) < nodes:
            assert isinstance(chosen, Refusal)
            return
        assert not isinstance(chosen, Refusal)
        by_name = {node.name: node for node in free}
        assert len({share.node for share in chosen}) == len(chosen) == nodes
        for share in chosen:
            assert len(share.devices) == devices
            assert set(share.devices) <= set(by_name[share.node].devices)

    def test_the_tightest_host_is_taken_first(self) -> None:
        free = [FreeNode("big", tuple(range(8)), 1), FreeNode("small", (3, 5), 1)]
        (share,) = choose(Need(1, 2), free)  # type: ignore[misc]  # a Refusal would fail the unpacking
        assert (share.node, share.devices) == ("small", (3, 5))

    def test_a_refusal_names_drained_hosts(self) -> None:
        drained = FreeNode("a", (0, 1), 1, drained=True)
        assert choose(Need(1, 0), [drained]) == Refusal("every healthy host is drained (a)")
        refusal = choose(Need(1, 2), [drained, FreeNode("b", (), 1)])
        assert refusal == Refusal("needs 1 host(s) with 2 free device(s); 0 fit(s) now (a: drained, b: 0 free)")

    def test_a_refusal_says_what_is_free(self) -> None:
        refusal = choose(Need(2, 4), [FreeNode("a", (0, 1), 1)])
        assert refusal == Refusal("needs 2 host(s) with 4 free device(s); 0 fit(s) now (a: 2 free)")


class TestOffersDevices:
    def test_cpu_hosts_train_only_where_there_is_nothing_better(self) -> None:
        assert offers_devices("cpu", {"cpu"})
        assert not offers_devices("cpu", {"cpu", "npu"})
        assert offers_devices("npu", {"cpu", "npu"})
