"""What a device has, and that every device of a machine is asked for its own."""

from types import SimpleNamespace

import pytest
import torch

from perplexity.errors import InputError
from perplexity.inputs import choose_backend
from perplexity.kernels import devices, dispatch
from perplexity.kernels.devices import Target

# name, compute capability
MACHINE = [
    ("NVIDIA H100", (9, 0)),
    ("NVIDIA GeForce RTX 5090", (12, 0)),
    ("NVIDIA GeForce RTX 2080", (7, 5)),
    ("NVIDIA A100", (8, 0)),
]


@pytest.fixture
def machine(monkeypatch):
    """A machine of four kinds of cards, the last of which is the current one."""

    def properties(index):
        name, (major, minor) = MACHINE[index]
        return SimpleNamespace(name=name, major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: MACHINE[index][0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "triton_available", lambda: True)
    devices.device_target.cache_clear()
    yield
    devices.device_target.cache_clear()


def on(index, dtype=torch.bfloat16):
    """What the choice of a backend reads of a tensor."""
    device = torch.device("cuda") if index is None else torch.device("cuda", index)
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("target", "unit", "copy_engine", "own", "wide"),
    [
        (Target("cuda", 70), "", False, False, False),
        (Target("cuda", 80), "mma", False, False, False),
        (Target("cuda", 90), "wgmma", True, False, True),
        (Target("cuda", 100), "tcgen05", True, True, True),
        (Target("cuda", 103), "tcgen05", True, True, True),
        (Target("cuda", 120), "mma", True, False, False),
        (Target("cuda", 121), "mma", True, False, False),
        (Target("cuda", 990), "mma", True, False, False),  # newer than the table
        (Target("hip", "gfx90a", 64), "mfma", False, False, False),
        (Target("hip", "gfx1100", 32), "wmma", False, False, False),
        (Target("hip", "gfx1030", 32), "", False, False, False),
        (Target("interpreter", 0), "interpreter", True, False, False),
    ],
)
def test_what_a_device_has(target, unit, copy_engine, own, wide):
    assert target.facts.matrix_unit == unit
    assert (target.copy_engine, target.own_accumulator, target.wide_accumulator) == (
        copy_engine,
        own,
        wide,
    )


def test_rdna_multiplies_16_bits_alone():
    target = Target("hip", "gfx1100", 32)
    assert target.multiplies(torch.bfloat16) and not target.multiplies(torch.float32)
    assert Target("hip", "gfx942", 64).multiplies(torch.float32)
    assert not Target("cuda", 75).multiplies(torch.float16)


def test_every_card_of_a_machine_is_asked_for_its_own(machine):
    found = [devices.device_target(devices.index_of(on(index).device)) for index in (0, 1, 2, None)]
    assert found == [Target("cuda", arch) for arch in (90, 120, 75, 80)]


@pytest.mark.parametrize(
    ("index", "dtype", "backend"),
    [
        (0, torch.bfloat16, "triton"),
        (1, torch.float32, "triton"),
        (2, torch.bfloat16, "torch"),  # products without a matrix unit
        (None, torch.bfloat16, "triton"),  # the current card
        (0, torch.float64, "torch"),
    ],
)
def test_the_default_backend_of_every_card(machine, index, dtype, backend, monkeypatch):
    monkeypatch.delenv("PERPLEXITY_BACKEND", raising=False)
    assert choose_backend(None, on(index, dtype)) == backend


def test_triton_says_why_not(machine):
    assert choose_backend("triton", on(0)) == "triton"
    with pytest.raises(InputError) as error:
        choose_backend("triton", on(2))
    assert str(error.value) == (
        "backend: 'triton' needs compute capability 8.0 or newer, "
        "got NVIDIA GeForce RTX 2080 (7.5); use 'torch'"
    )


def test_an_amd_card_is_known_by_its_architecture(machine, monkeypatch):
    def properties(index):
        return SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", warp_size=64)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.device_target(0) == Target("hip", "gfx942", 64)
