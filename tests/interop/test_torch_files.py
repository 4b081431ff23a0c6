"""Torch files without torch: the same values as torch reads, and nothing in a file is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from aromni_jax.interop.torch_files import Named, StoredTensor, read_state_dict, read_torch_file, write_state_dict


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(40)
    return {
        "plain": torch.randn(3, 4, 5),
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 7),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "view": shared[7:19].reshape(3, 4)[:, ::2],
        "whole": shared,
        "expanded": torch.randn(3, 1).expand(3, 4),
    }


def equal(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    return ours.shape == tuple(theirs.shape) and np.array_equal(
        ours.astype(np.float64), theirs.to(torch.float64).numpy()
    )


def archive(path, pickled: bytes, **entries: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_of_torch_save(tmp_path, protocol):
    path = tmp_path / "model.ckpt"
    torch.save({"epoch": 3, "state_dict": OrderedDict(tensors())}, path, pickle_protocol=protocol)
    found = read_state_dict(path)
    assert list(found) == list(tensors())
    for name, expected in tensors().items():
        assert found[name].shape == tuple(expected.shape)
        assert equal(found[name].read(), expected), name
    assert found["bfloat16"].dtype.name == "bfloat16" and found["scalar"].read().dtype == np.int64


def test_what_stands_around_weights_in_training_checkpoints(tmp_path):
    """Modules' metadata, parameters, optimizer state, numpy scalars, and names of classes used as keys."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "state_dict": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "best": np.float64(0.5),
            "array": np.arange(3),
            "callbacks": {torch.nn.Linear: {"best": torch.ones(1)}},
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "shape": torch.Size([1, 2]),
            "names": {"a", "b"},
        },
        tmp_path / "x.ckpt",
    )
    content = read_torch_file(tmp_path / "x.ckpt")
    assert sorted(content["names"]) == ["a", "b"] and content["shape"] == (1, 2)
    assert content["parameter"].read().tolist() == [1, 1]
    assert isinstance(content["best"], Named) and Named("torch.nn.modules.linear.Linear") in content["callbacks"]
    assert isinstance(content["optimizer"]["state"][0]["exp_avg"], StoredTensor)
    for name, value in read_state_dict(tmp_path / "x.ckpt").items():
        assert equal(value.read(), net.state_dict()[name])


def test_torch_reads_what_we_write(tmp_path):
    written = {f"layer.{name}": np.ascontiguousarray(t.numpy()) for name, t in tensors().items() if name != "bfloat16"}
    write_state_dict(tmp_path / "x.ckpt", written)
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    ours = read_state_dict(tmp_path / "x.ckpt")
    assert list(loaded) == list(ours) == list(written)
    for name, value in written.items():
        assert loaded[name].numpy().dtype == value.dtype
        np.testing.assert_array_equal(loaded[name].numpy(), value)
        np.testing.assert_array_equal(ours[name].read(), value)
    with pytest.raises(ValueError, match="'phase' is complex64"):
        write_state_dict(tmp_path / "x.ckpt", {"phase": np.zeros(2, np.complex64)})


class Attack:
    """Unpickled the usual way, it makes a file; `how` is what it asks to call."""

    def __init__(self, how, *arguments):
        self.how, self.arguments = how, arguments

    def __reduce__(self):
        return self.how, self.arguments


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("call", ["os.system", "eval", "exec", "loads"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol, call):
    victim = tmp_path / "victim"
    code = f"open({str(victim)!r}, 'w').close()"
    attacks = {
        "os.system": Attack(os.system, f"touch {victim}"),
        "eval": Attack(eval, code),
        "exec": Attack(exec, code),
        "loads": Attack(pickle.loads, pickle.dumps(Attack(eval, code))),
    }
    path = archive(tmp_path / "x.ckpt", pickle.dumps({"state_dict": {"w": attacks[call]}}, protocol))
    with pytest.raises(ValueError, match=r"asks to call '(posix.system|builtins.(eval|exec)|_?pickle.loads)'"):
        read_state_dict(path)
    assert not victim.exists()
    pickle.loads(zipfile.ZipFile(path).read("archive/data.pkl"))
    assert victim.exists(), "the attack is a real one"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "STRING"),  # protocol 0
        (b"(cos\nsystem\nX\x04\x00\x00\x00trueo.", "OBJ"),
        (b"(X\x04\x00\x00\x00trueios\nsystem\n.", "INST"),
        (b"\x80\x02cos\nsystem\n)\x81.", "os.system"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02}(K\x01K\x02", "damaged"),
        (b"\x80\x02u.", "damaged"),
        (b"\x80\x02\x85.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02}}K\x01s.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02K\x01K\x02b.", "damaged"),
        (b"\x80\x02K\x01.", "no dictionary"),
        (b"\x80\x02}K\x01K\x02s.", "no dictionary"),
    ],
)
def test_other_ways_to_call_and_nonsense_are_refused(tmp_path, pickled, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_state_dict(archive(tmp_path / "x.ckpt", pickled))
    assert "x.ckpt" in str(caught.value)


def test_every_prefix_of_a_pickle_is_a_value_error(tmp_path):
    write_state_dict(tmp_path / "good.ckpt", {"w": np.ones(2, np.float32)})
    whole = zipfile.ZipFile(tmp_path / "good.ckpt").read("archive/data.pkl")
    for end in range(len(whole)):
        with pytest.raises(ValueError):
            read_state_dict(archive(tmp_path / "cut.ckpt", whole[:end], **{"data/0": b"\0" * 8}))


def pickled_tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int = 4) -> bytes:
    """A pickle of one float32 tensor with any numbers in it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", size) if obj is Ellipsis else None

    out = io.BytesIO()
    tensor = Attack(torch._utils._rebuild_tensor_v2, ..., offset, shape, strides, False, OrderedDict())
    Pickler(out, protocol=2).dump({"w": tensor})
    return out.getvalue()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, (5,), (1,)), "beyond its storage"),
        ((2, (3,), (1,)), "beyond its storage"),
        ((0, (2, 2), (3, 1)), "beyond its storage"),
        ((0, (-1,), (1,)), "shape"),
        ((0, (2,), (-1,)), "strides"),
        ((-1, (1,), (1,)), "offset"),
        ((0, (2, 2), (1,)), "strides"),
        ((0, (1.5,), (1,)), "shape"),
        ((0, (5,), (1,), 5), "missing or shorter"),
    ],
)
def test_tensors_cannot_reach_outside_their_storage(tmp_path, numbers, message):
    storage = {"data/0": np.arange(4, dtype=np.float32).tobytes()}
    good = read_state_dict(archive(tmp_path / "good.ckpt", pickled_tensor(1, (3,), (1,)), **storage))
    assert good["w"].read().tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=message):
        read_state_dict(archive(tmp_path / "bad.ckpt", pickled_tensor(*numbers), **storage))


def test_files_of_another_kind_are_named(tmp_path):
    old, cut, text = tmp_path / "old.pt", tmp_path / "cut.pt", tmp_path / "text.pt"
    torch.save({"w": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    torch.save({"w": torch.ones(2000)}, cut)
    cut.write_bytes(cut.read_bytes()[:4000])
    text.write_text("not a checkpoint")
    for path in (old, cut, text):
        with pytest.raises(ValueError, match=f"{path.name} is not a zip file of torch.save"):
            read_state_dict(path)
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(ValueError, match="compressed entry"):
        read_state_dict(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(ValueError, match="0 entries data.pkl"):
        read_state_dict(tmp_path / "other.pt")
    big = archive(tmp_path / "big.pt", b"\x80\x02}.", byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        read_state_dict(big)


def test_a_damaged_storage_is_named(tmp_path):
    path = tmp_path / "x.ckpt"
    write_state_dict(path, {"w": np.arange(100, dtype=np.float32)})
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<f", 50.0))
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="archive/data/0 is damaged"):
        read_state_dict(path)["w"].read()
