"""Safetensors files and sharded checkpoints: right reads, and one named error for everything else."""

import functools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

from glm4v_jax.checkpoints.safetensors import LazyTensor, SafetensorsFile, open_checkpoint, write_safetensors
from glm4v_jax.errors import CheckpointError

DTYPES = [
    np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu, np.int32,
    np.uint32, np.float32, np.complex64, np.float64, np.int64, np.uint64,
]  # fmt: skip


def _tensors():
    rng = np.random.default_rng(0)
    tensors = {}
    for dtype in DTYPES:
        name = np.dtype(dtype).name
        tensors[f"{name}.matrix"] = rng.integers(0, 2, (3, 5)).astype(dtype)
        tensors[f"{name}.scalar"] = np.array(1).astype(dtype)
        tensors[f"{name}.empty"] = np.zeros((0, 4), dtype)
    return tensors


def _bits(array):
    return array.shape, array.dtype, np.ascontiguousarray(array).tobytes()


def _craft(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _twice(one, other):
    return f'{{"w": {json.dumps(one)}, "w": {json.dumps(other)}}}'.encode()


def _shards(directory, shards, weight_map=None):
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
    if weight_map is None:
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


class TestReading:
    def test_every_dtype_scalars_and_empty_tensors(self, tmp_path):
        tensors = _tensors()
        save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
        file = SafetensorsFile(tmp_path / "a.safetensors")
        assert file.metadata == {"format": "pt"}
        assert sorted(file) == sorted(tensors)
        for name, tensor in tensors.items():
            assert _bits(file.read(name)) == _bits(tensor)
            assert file[name] == (tensor.shape, tensor.dtype, tmp_path / "a.safetensors")
            assert file[name].nbytes == tensor.nbytes

    def test_it_reads_bfloat16_as_torch_writes_it(self, tmp_path):
        torch = pytest.importorskip("torch")
        save_torch = pytest.importorskip("safetensors.torch").save_file
        tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        save_torch({"w": tensor}, tmp_path / "a.safetensors")
        ours = SafetensorsFile(tmp_path / "a.safetensors").read("w")
        assert ours.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(ours.astype(np.float32), tensor.float().numpy())

    @pytest.mark.parametrize(
        "index", [..., np.s_[1], np.s_[1:2], np.s_[::2, 1:], np.s_[..., 0], np.s_[0:0], np.s_[-1, -1], np.s_[:, ::-1]]
    )
    def test_slices_are_numpy_slices(self, tmp_path, index):
        tensor = np.arange(20, dtype=np.float32).reshape(4, 5).astype(ml_dtypes.bfloat16)
        save_file({"w": tensor}, tmp_path / "a.safetensors")
        ours = SafetensorsFile(tmp_path / "a.safetensors").read("w", index)
        assert isinstance(ours, np.ndarray)
        assert _bits(ours) == _bits(np.asarray(tensor[index]))

    def test_slices_of_scalars_and_of_empty_tensors(self, tmp_path):
        save_file({"s": np.array(3.5, np.float32), "e": np.zeros((0, 4), np.float32)}, tmp_path / "a.safetensors")
        file = SafetensorsFile(tmp_path / "a.safetensors")
        assert _bits(file.read("s", ())) == _bits(np.array(3.5, np.float32))
        assert file.read("e", np.s_[0:0, 1:3]).shape == (0, 2)

    def test_reads_are_read_only_views_that_outlive_the_reader(self, tmp_path):
        save_file({"w": np.arange(6.0)}, tmp_path / "a.safetensors")
        file = SafetensorsFile(tmp_path / "a.safetensors")
        whole, part = file.read("w"), file.read("w", np.s_[2:4])
        assert np.shares_memory(whole, part)
        assert not whole.flags.writeable and not whole.flags.owndata
        del file
        np.testing.assert_array_equal(part, [2.0, 3.0])

    def test_data_at_an_odd_offset_are_read(self, tmp_path):
        values = np.arange(3, dtype=np.float32).astype(ml_dtypes.bfloat16)
        header = json.dumps({"w": _entry("BF16", [3], 0, 6)})
        path = _craft(tmp_path / "a.safetensors", (header + " " * (1 - len(header) % 2)).encode(), values.tobytes())
        ours = SafetensorsFile(path).read("w")
        assert ours.ctypes.data % 2 == 1
        assert _bits(ours) == _bits(values)
        np.testing.assert_array_equal(ours.astype(np.float32) * 2, [0.0, 2.0, 4.0])

    def test_a_large_tensor_is_not_loaded_to_read_a_slice(self, tmp_path):
        gibibytes = 4
        count = gibibytes << 30
        path = _craft(tmp_path / "a.safetensors", {"w": _entry("U8", [count], 0, count)})
        os.truncate(path, path.stat().st_size + count)  # a hole, which takes no room on the disk
        ours = SafetensorsFile(path).read("w", np.s_[-3:])
        np.testing.assert_array_equal(ours, [0, 0, 0])

    def test_unknown_names_are_key_errors(self, tmp_path):
        save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors")
        for reader in (SafetensorsFile(tmp_path / "model.safetensors"), open_checkpoint(tmp_path)):
            with pytest.raises(KeyError, match="v"):
                reader.read("v")

    def test_it_needs_neither_jax_nor_torch(self):
        code = "import sys, glm4v_jax.checkpoints.safetensors; assert not {'jax', 'torch'} & sys.modules.keys()"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "found 0 bytes; expected at least 8"),
            (b"abc", "found 3 bytes; expected at least 8"),
            (struct.pack("<Q", 10**7) + b"{}", "found 10 bytes; expected 10,000,008"),
            (struct.pack("<Q", 2**63) + b"{}", "found 10 bytes; expected 9,223,372,036,854,775,816"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
            (pickle.dumps({"w": [1.0] * 100}, protocol=4), "as the first 8 say"),
        ],
    )
    def test_files_without_a_header_are_named(self, tmp_path, content, message):
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(message)) as error:
            SafetensorsFile(path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        ("header", "data", "message"),
        [
            (b"{bad", b"", "corrupt header"),
            (b"[]", b"", "corrupt header"),
            (b"\xff\xfe", b"", "corrupt header"),
            (b'{"w":null}', b"", "corrupt header"),
            ({"__metadata__": {"a": 3}}, b"", "corrupt header"),
            (
                {"w": _entry("F32", [1000], 0, 4000)},
                b"0" * 999,
                r"found 1,0\d\d bytes; expected 4,0\d\d, as the header says",
            ),
            ({"w": _entry("F32", [2], 0, 8)}, b"0" * 9, "as the header says"),
            ({"w": _entry("F32", [3], 0, 8)}, b"0" * 8, "corrupt header.*invalid shape"),
            ({"w": _entry("Q9", [2], 0, 8)}, b"0" * 8, "corrupt header.*Q9"),
            ({"w": _entry("F4", [4], 0, 2)}, b"0" * 2, "w: found dtype F4; expected one of BOOL"),
            ({"w": _entry("F32", [-2], 0, 8)}, b"0" * 8, "corrupt header.*-2"),
            ({"w": _entry("F32", [2**62, 2**62], 0, 8)}, b"0" * 8, "corrupt header.*overflow"),
            ({"w": _entry("U8", [8], 0, 8), "v": _entry("U8", [8], 4, 12)}, b"0" * 12, "corrupt header.*offset"),
            ({"w": _entry("U8", [8], 0, 8), "v": _entry("U8", [2], 10, 12)}, b"0" * 12, "corrupt header.*offset"),
            ({"w": _entry("U8", [8], 8, 0)}, b"", "corrupt header|as the header says"),
            # JSON lets a key come twice, and most readers take the last.
            (_twice(_entry("U8", [8], 0, 8), _entry("U8", [8], 8, 16)), b"0" * 16, "corrupt header"),
        ],
    )
    def test_bad_headers_are_named(self, tmp_path, header, data, message):
        path = _craft(tmp_path / "a.safetensors", header, data)
        with pytest.raises(CheckpointError, match=message) as error:
            SafetensorsFile(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_missing_file_is_named(self, tmp_path):
        for path in (tmp_path / "none.safetensors", tmp_path):
            with pytest.raises(CheckpointError, match=r"expected a safetensors file") as error:
                SafetensorsFile(path)
            assert str(path) in str(error.value)


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "a.safetensors"
    save_file(_tensors(), path, {"format": "pt"})
    return path.read_bytes()


def _read_or_named_error(path):
    """Reads every tensor of a file, and compares with the library's other way of reading, or returns the error."""
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return error
    expected = dict(deserialize(path.read_bytes()))
    assert set(file) == set(expected)
    for name, entry in expected.items():
        array = file.read(name)
        assert list(array.shape) == entry["shape"]
        assert array.tobytes() == bytes(entry["data"])
    return None


class TestFuzz:
    settings = settings(
        max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )

    @pytest.mark.slow
    @settings
    @given(share=st.floats(0, 1, exclude_max=True))
    def test_truncation_is_always_named(self, sound_file, tmp_path, share):
        path = tmp_path / "a.safetensors"
        path.write_bytes(sound_file[: int(share * len(sound_file))])
        assert re.search(r"found [\d,]+ bytes", str(_read_or_named_error(path)))

    @settings
    @given(data=st.data())
    def test_flipped_bytes_of_the_header_are_named_or_harmless(self, sound_file, tmp_path, data):
        content = bytearray(sound_file)
        end = 8 + int.from_bytes(content[:8], "little")
        for position in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)):
            content[position] ^= data.draw(st.integers(1, 255))
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        _read_or_named_error(path)

    @settings
    @given(content=st.binary(max_size=200), length=st.integers(0, 200))
    def test_arbitrary_bytes_are_named(self, tmp_path, content, length):
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", length) + content)
        _read_or_named_error(path)


class TestCheckpoint:
    def test_a_single_file_is_read(self, tmp_path):
        save_file({"a": np.arange(3.0), "b": np.ones((2, 2), np.float16)}, tmp_path / "model.safetensors")
        files = open_checkpoint(tmp_path)
        assert sorted(files) == ["a", "b"] and len(files) == 2 and "c" not in files
        assert files["b"] == ((2, 2), np.float16, tmp_path / "model.safetensors")
        np.testing.assert_array_equal(files.read("a", np.s_[1:]), [1.0, 2.0])

    def test_shards_are_read_together(self, tmp_path):
        first, second = {"a": np.arange(3.0), "b": np.zeros(1)}, {"c": np.ones(2, np.float32)}
        _shards(tmp_path, {"model-1.safetensors": first, "model-2.safetensors": second})
        files = open_checkpoint(str(tmp_path))
        assert sorted(files) == ["a", "b", "c"]
        for name, tensor in (first | second).items():
            assert _bits(files.read(name)) == _bits(tensor)
        assert files["c"].file == tmp_path / "model-2.safetensors"
        assert [file.path.name for file in files.files] == ["model-1.safetensors", "model-2.safetensors"]

    def test_it_reads_the_shards_that_the_hub_library_writes(self, tmp_path):
        torch = pytest.importorskip("torch")
        hub = pytest.importorskip("huggingface_hub")
        generator = torch.Generator().manual_seed(0)
        state = {f"layers.{i}.w": torch.randn(16, i + 1, generator=generator) for i in range(20)}
        hub.save_torch_state_dict(state, tmp_path, max_shard_size=2_000)
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        files = open_checkpoint(tmp_path)
        assert set(files) == set(state)
        for name, tensor in state.items():
            np.testing.assert_array_equal(files.read(name), tensor.numpy())

    def test_the_single_file_wins_over_an_index_as_in_the_reference(self, tmp_path):
        _shards(tmp_path, {"model-1.safetensors": {"a": np.zeros(2)}})
        save_file({"b": np.zeros(2)}, tmp_path / "model.safetensors")
        assert list(open_checkpoint(tmp_path)) == ["b"]

    @pytest.mark.parametrize(
        ("present", "message"),
        [
            ([], "found no weights; expected model.safetensors, or model.safetensors.index.json and its shards"),
            (["config.json"], "found no weights"),
            (["pytorch_model.bin"], r"pickled weights only \(pytorch_model.bin\), which are never loaded because"),
            (["x.pt"], "pickled weights only"),
            (["x.ckpt"], "pickled weights only"),
            (["model-00001-of-00002.safetensors"], "found model-00001-of-00002.safetensors without an index"),
        ],
    )
    def test_directories_without_weights(self, tmp_path, present, message):
        for name in present:
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=message) as error:
            open_checkpoint(tmp_path)
        assert str(tmp_path) in str(error.value)

    def test_a_missing_directory_is_named(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        for path in (tmp_path / "file", tmp_path / "none", "zai-org/GLM-4.1V-9B-Thinking"):
            with pytest.raises(CheckpointError, match="found no directory") as error:
                open_checkpoint(path)
            assert str(path) in str(error.value)

    def test_pickled_weights_are_not_executed_beside_or_instead(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
        with pytest.raises(CheckpointError, match="pickled"):
            open_checkpoint(tmp_path)
        save_file({"b": np.zeros(2)}, tmp_path / "model.safetensors")
        assert list(open_checkpoint(tmp_path)) == ["b"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "found invalid JSON"),
            ("{", "found invalid JSON"),
            ("[" * 100_000, "found invalid JSON"),
            ("[]", "found a JSON list; expected an object"),
            ("{}", "no 'weight_map'"),
            ('{"weight_map": []}', "no 'weight_map'"),
        ],
    )
    def test_a_bad_index_is_named(self, tmp_path, text, message):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message) as error:
            open_checkpoint(tmp_path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        "shard",
        ["../x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "/etc/passwd", "..", ".", "", "a\0b", None, 7],
    )
    def test_an_index_cannot_point_out_of_its_directory(self, tmp_path, shard):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(tmp_path)
        assert f"{path}: a: found shard {shard!r}; expected the name of a file" in str(error.value)

    def test_all_faults_of_shards_in_one_error(self, tmp_path):
        one, two, three, four = (f"model-{i}.safetensors" for i in range(1, 5))
        shards = {
            one: {"right": np.zeros(1), "twice": np.zeros(1), "moved": np.zeros(1)},
            two: {"twice": np.zeros(1), "extra": np.zeros(1)},
        }
        weight_map = {"right": one, "twice": one, "moved": two, "lost": one, "away": three, "gone": three, "cut": four}
        _shards(tmp_path, shards, weight_map)
        save_file({"cut": np.zeros(100)}, tmp_path / four)
        os.truncate(tmp_path / four, 300)
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(tmp_path)
        for fault in (
            f"{three}: found no such file; expected a shard of 2 tensors",
            f"{four}: found 300 bytes; expected",
            f"twice: found in {one} and in {two}; expected in one shard",
            f"extra: found in {two}; expected in the index too",
            f"lost: found no such tensor; expected in {one}",
            f"moved: found in {one}; expected in {two}",
        ):
            assert fault in str(error.value)
        assert str(error.value).startswith(f"{tmp_path}: shards do not match model.safetensors.index.json: ")
        assert "right" not in str(error.value) and "\n" not in str(error.value)


class TestWriting:
    def test_files_equal_the_library_byte_for_byte(self, tmp_path):
        write_safetensors(tmp_path / "ours", _tensors(), {"format": "pt"})
        save_file(_tensors(), tmp_path / "theirs", {"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]

    def test_round_trip_of_views_byte_orders_and_names(self, tmp_path):
        matrix = np.arange(12.0).reshape(3, 4)
        tensors = {"T": matrix.T, "step": matrix[:, ::2], "big": matrix.astype(">f4"), 'ü "\\\n': np.array(True)}
        write_safetensors(tmp_path / "a", tensors)
        file = SafetensorsFile(tmp_path / "a")
        assert file.metadata == {}
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.read(name), tensor)
        with safe_open(tmp_path / "a", framework="np") as theirs:
            np.testing.assert_array_equal(theirs.get_tensor("T"), matrix.T)

    def test_a_file_may_be_empty(self, tmp_path):
        write_safetensors(tmp_path / "a", {})
        assert list(SafetensorsFile(tmp_path / "a")) == []

    def test_values_are_asked_for_one_at_a_time(self, tmp_path):
        alive, most = set(), []

        def counted(name):
            array = np.zeros(4, np.float32)
            alive.add(name)
            weakref.finalize(array, alive.discard, name)
            most.append(len(alive))
            yield array

        dtype = np.dtype(np.float32)
        tensors = {name: LazyTensor((4,), dtype, functools.partial(counted, name)) for name in "abcdef"}
        write_safetensors(tmp_path / "a", tensors)
        assert most == [1] * 6

    def test_chunks_that_end_within_rows_come_out_in_order(self, tmp_path, monkeypatch):
        monkeypatch.setattr("glm4v_jax.checkpoints.safetensors.CHUNK_BYTES", 100)
        rng = np.random.default_rng(0)
        tensors = {"t": rng.standard_normal((7, 3, 5)).T, "f": rng.standard_normal((9, 30)).astype(np.float32)}
        write_safetensors(tmp_path / "a", tensors)
        file = SafetensorsFile(tmp_path / "a")
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.read(name), tensor)

    @pytest.mark.parametrize(
        ("tensors", "metadata", "message"),
        [
            ({"w": np.array(["text"])}, None, "w: found dtype <U4"),
            ({"w": np.array([None])}, None, "w: found dtype object"),
            ({"w": np.zeros(1, np.complex128)}, None, "w: found dtype complex128"),
            ({"__metadata__": np.zeros(1)}, None, "__metadata__: found a reserved name"),
            ({}, {"a": 1}, "metadata: found 'a': 1"),
        ],
    )
    def test_what_the_format_cannot_store_is_refused(self, tmp_path, tensors, metadata, message):
        path = tmp_path / "a"
        path.write_bytes(b"before")
        with pytest.raises(CheckpointError, match=message):
            write_safetensors(path, tensors, metadata)
        assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize(
        ("chunk", "message"),
        [
            (np.zeros(2, np.float32), "z: found 2 numbers; expected 3 as announced"),
            (np.zeros(4, np.float32), "z: found 4 of float32; expected 3 of float32"),
            (np.zeros(3, np.float16), "z: found 3 of float16; expected 3 of float32"),
        ],
    )
    def test_other_values_than_announced_leave_the_old_file(self, tmp_path, chunk, message):
        wrong = LazyTensor((3,), np.dtype(np.float32), lambda: iter([chunk]))
        path = tmp_path / "a"
        path.write_bytes(b"before")
        with pytest.raises(CheckpointError, match=message):
            write_safetensors(path, {"a": np.zeros(5), "z": wrong})
        assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]
