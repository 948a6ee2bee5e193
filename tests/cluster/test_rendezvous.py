"""Ranks that cannot work together are refused by what each says of itself."""

import pytest

from gearshift.engine.cluster import rendezvous


def rank(host="n0", slot="0", backend="gloo", address="10.0.0.1", space="a") -> dict[str, str]:
    return {"host": host, "space": space, "slot": slot, "backend": backend, "address": address}


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([rank(), rank(slot="1"), rank("n1"), rank("n1", "1")], None),
        ([rank(), rank(space="b")], None),  # containers of one host
        ([rank(address="127.0.1.1"), rank(slot="1", address="127.0.1.1")], None),  # no other host
        (
            [rank(), rank("n1"), rank("n0")],
            "ranks 0 and 2 are both local rank 0 of n0; name each machine once in the hostfile",
        ),
        (
            [rank(backend="cpu:gloo,cuda:nccl"), rank("n1")],
            "hosts do not all have GPUs: n1 has gloo, n0 cpu:gloo,cuda:nccl; see nvidia-smi",
        ),
        (
            [rank(), rank("n1", address="127.0.1.1")],
            "host n1: its own name means 127.0.1.1 there: others cannot reach it; mend its",
        ),
        ([rank(), rank("n1", address="")], "host n1: its own name means nothing there"),
    ],
)
def test_ranks_that_met(monkeypatch, ranks, told):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if told is None:
        return rendezvous.check(ranks)
    with pytest.raises(ValueError, match=told):
        rendezvous.check(ranks)
    if "/etc/hosts" in told:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
        rendezvous.check(ranks)
