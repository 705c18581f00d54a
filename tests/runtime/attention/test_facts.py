"""What the host knows of masks and data: read once a batch."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tspc.runtime.attention import facts
from tspc.runtime.attention.facts import fact
from tspc.seams.fake_device import allow


def test_a_fact_is_read_again_when_one_of_its_tensors_changes() -> None:
    a, b, count = torch.ones(2), torch.ones(3), [0]

    def read() -> int:
        count[0] += 1
        return count[0]

    assert [fact("sum", [a, b], read, 0) for _ in range(2)] == [1, 1]
    assert fact("other", [a, b], read, 0) == 2
    a.add_(1)
    assert fact("sum", [a, b], read, 0) == 3
    b.add_(1)
    assert fact("sum", [a, b], read, 0) == 4
    assert fact("sum", [a, b.clone()], read, 0) == 5  # of another batch
    assert fact("sum", [a], read, 0) == 6
    with torch.inference_mode():  # it tells of no change
        c = torch.ones(2)
        assert [fact("sum", [a, c], read, 0) for _ in range(2)] == [7, 8]
    place = id(b)
    del b
    other = [torch.ones(3) for _ in range(99)]  # one may stand where the other stood
    for x in sorted(other, key=lambda x: id(x) != place)[:2]:
        before = count[0]
        assert fact("sum", [a, x], read, 0) == before + 1
    assert a in facts._KNOWN
    count_before = len(facts._KNOWN)
    del a
    assert len(facts._KNOWN) == count_before - 1


def test_without_values_a_wait_is_noted() -> None:
    allow("cuda")
    facts.noted()
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            x = torch.empty(3, device=device)
            for _ in range(2):
                assert fact("any", [x], lambda x=x: bool(x.any()), False) is False
    facts.KERNELS.extend(["flash", "flash"])
    kernels, waits = facts.noted()
    assert kernels == ("flash",) and len(waits) == 1 and "once a batch" in waits[0]
    assert facts.noted() == ((), ())
