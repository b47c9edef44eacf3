"""Checkpoints: whole or not at all, whatever happens while they are written or lie on the disk."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from better_attention.lab.runs import checkpoint


def tensors(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((3, 5), value), "b.c": torch.arange(7) + int(value)}


def version(folder: Path) -> int | None:
    """Which of the saved states lies in the folder, its tensors checked against it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checkpoint.load(folder)
    if found is None:
        return None
    value = int(found[1]["value"])
    expected = tensors(value)
    assert found[0].keys() == expected.keys()
    assert all(torch.equal(found[0][name], expected[name]) for name in expected)
    return value


def save(folder: Path, value: int) -> None:
    checkpoint.save(folder, tensors(value), {"value": value, "third": 1 / 3, "curve": [{"loss": 0.1}]})


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    for value in range(4):
        save(tmp_path, value)
    assert version(tmp_path) == 3
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[1] == {"value": 3, "third": 1 / 3, "curve": [{"loss": 0.1}]}
    assert len(list(tmp_path.iterdir())) == 4  # two pairs
    checkpoint.clear(tmp_path)
    assert not list(tmp_path.iterdir())


class CrashError(BaseException):
    """The process ends here, as far as the code under test can tell."""


def test_a_crash_before_any_file_operation_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write, fsync, rename and unlink of a save is tried as the last moment of the process."""
    outcomes: list[int] = []
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        save(folder, 1)
        save(folder, 2)
        calls = 0
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fdopen"), (os, "fsync"), (Path, "replace"), (Path, "unlink")):
                real = getattr(owner, name)

                def step(*arguments: object, real: object = real, last: int = moment, **named: object) -> object:
                    nonlocal calls
                    calls += 1
                    if calls >= last:
                        raise CrashError
                    return real(*arguments, **named)  # type: ignore[operator]

                patch.setattr(owner, name, step)
            try:
                save(folder, 3)
            except CrashError:
                outcomes.append(version(folder) or 0)
            else:
                break
    assert len(outcomes) >= 8
    assert set(outcomes) == {2, 3}
    assert outcomes == sorted(outcomes)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_every_flipped_bit_is_noticed(tmp_path: Path, suffix: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / f"checkpoint-000002{suffix}"
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        # Only a bit that leaves the JSON value as it is (a space, say) may pass: the state is then the new one, whole.
        same = suffix == ".json" and _json(bytes(damaged)) == _json(whole)
        assert version(tmp_path) == (2 if same else 1), place
    path.write_bytes(whole)
    assert version(tmp_path) == 2


def _json(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_shortened_file_is_passed_over_with_a_warning(tmp_path: Path, suffix: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / f"checkpoint-000002{suffix}"
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="passing over a damaged checkpoint"):
            found = checkpoint.load(tmp_path)
        assert found is not None
        assert found[1]["value"] == 1


def test_tensors_of_another_checkpoint_are_noticed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoint-000001.safetensors").replace(tmp_path / "checkpoint-000002.safetensors")
    assert version(tmp_path) is None


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert version(tmp_path) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_an_optimiser_comes_back_exactly() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in models)
    x = torch.randn(7, 3)

    def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        model(x).pow(2).sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    for _ in range(3):
        step(models[0], first)
    models[1].load_state_dict(models[0].state_dict())
    stored = checkpoint.tensor_bytes(checkpoint.optimiser_tensors(first))
    checkpoint.load_optimiser(second, safetensors.torch.load(stored))
    step(models[0], first)
    step(models[1], second)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_weights_are_checked_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint.tensor_bytes(nn.Linear(3, 5).state_dict()))
    with torch.device("meta"):
        right, wrong, double = nn.Linear(3, 5), nn.Linear(3, 4), nn.Linear(3, 5, dtype=torch.float64)
    checkpoint.load_weights(right, path)
    assert right.weight.device.type == "cpu"
    with pytest.raises(ValueError, match=r"weight: \(5, 3\) in the file, \(4, 3\) in the model"):
        checkpoint.load_weights(wrong, path)
    with pytest.raises(ValueError, match=r"bias is torch\.float32 in the file, torch\.float64 in the model"):
        checkpoint.load_weights(double, path)
    path.write_bytes(checkpoint.tensor_bytes({"weight": torch.zeros(5, 3), "extra": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"bias: missing in the file, \(5,\) in the model\n  extra: \(2,\)"):
        checkpoint.load_weights(right, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        checkpoint.load_weights(right, path)
