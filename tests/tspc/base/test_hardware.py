"""Tables of hardware: by name, by fields, by device."""

from __future__ import annotations

import pytest
import torch

from tspc.base.errors import OptionError
from tspc.base.hardware import HARDWARE, Hardware, device_name, hardware

FIELDS = {"flops": 1.0, "bandwidth": 2, "latency": 3.0, "overlap": 0.5}


def test_a_table_by_name_by_fields_or_as_it_is() -> None:
    table = Hardware(1.0, 2.0, 3.0, 0.5)
    assert hardware("a100", "cpu") is HARDWARE["a100"]
    assert hardware(FIELDS, "cpu") == table and hardware(table, "cpu") is table


@pytest.mark.parametrize(
    "device,name", [("cpu", "cpu"), ("NVIDIA H200 NVL", "h200"), ("a new one", "h100")]
)
def test_by_device(device: str, name: str) -> None:
    assert hardware(None, device) is HARDWARE[name]


@pytest.mark.parametrize(
    "choice,text",
    [
        ("abacus", "hardware='abacus'; valid: cpu, a100"),
        ({"flops": 1.0}, "a table has bandwidth, flops, latency, overlap"),
        ({**FIELDS, "flops": "fast"}, "its values are numbers"),
        (3, "hardware=3; valid"),
    ],
)
def test_no_table(choice: object, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        hardware(choice, "cpu")


def test_the_name_of_a_device() -> None:
    assert device_name(torch.device("cpu")) == "cpu"
    assert device_name(torch.device("meta")) == "h100"
