import hashlib
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfactory_ray.errors import StorageError
from fedfactory_ray.storage.files import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(storage: Storage, tmp_path: Path) -> None:
    storage.write("a/b/c.bin", b"\x00\xff")
    assert storage.read("a/b/c.bin") == b"\x00\xff"
    assert (tmp_path / "run" / "a" / "b" / "c.bin").read_bytes() == b"\x00\xff"
    storage.write("a/b/c.bin", b"")
    assert storage.read("a/b/c.bin") == b""
    assert files_below(tmp_path) == ["run/a/b/c.bin"]


def test_a_block_writes_in_pieces_and_the_file_appears_at_its_end(storage: Storage) -> None:
    with storage.writing("big.bin") as stream:
        for piece in range(100):
            stream.write(bytes([piece]) * 1000)
            assert not storage.exists("big.bin")
    assert storage.read("big.bin") == b"".join(bytes([piece]) * 1000 for piece in range(100))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failing_block_leaves_neither_file_nor_temporary(
    storage: Storage, tmp_path: Path, kind: type[BaseException]
) -> None:
    with pytest.raises(kind), storage.writing("folder/half.bin") as stream:
        stream.write(b"half" * 10_000)
        raise kind
    assert not storage.exists("folder/half.bin")
    assert storage.names("") == []
    assert files_below(tmp_path) == []


def test_a_failing_block_keeps_the_file_that_was_there(storage: Storage, tmp_path: Path) -> None:
    storage.write("a.bin", b"old")
    with pytest.raises(ValueError, match="broken"), storage.writing("a.bin") as stream:
        stream.write(b"new")
        raise ValueError("broken")
    assert storage.read("a.bin") == b"old"
    assert files_below(tmp_path) == ["run/a.bin"]


def test_two_writers_of_one_file_do_not_mix(storage: Storage) -> None:
    with storage.writing("a.bin") as first:
        first.write(b"1" * 100)
        with storage.writing("a.bin") as second:
            second.write(b"2" * 50)
        assert storage.read("a.bin") == b"2" * 50
        first.write(b"1" * 100)
    assert storage.read("a.bin") == b"1" * 200
    assert storage.names("") == ["a.bin"]


def test_names_are_sorted_relative_and_of_files_only(storage: Storage) -> None:
    for name in ("b/2.bin", "b/1.bin", "a.bin", "b/deep/er/0.bin", "bb/9.bin"):
        storage.write(name, b"")
    assert storage.names("b") == ["b/1.bin", "b/2.bin", "b/deep/er/0.bin"]
    assert storage.names("") == ["a.bin", "b/1.bin", "b/2.bin", "b/deep/er/0.bin", "bb/9.bin"]
    assert storage.names("nowhere") == []


def test_only_files_exist(storage: Storage) -> None:
    storage.write("folder/a.bin", b"")
    assert storage.exists("folder/a.bin")
    assert not storage.exists("folder")
    assert not storage.exists("folder/b.bin")


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
def test_sha256_is_that_of_the_content(storage: Storage, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    storage.write("a.bin", content[:size])
    assert storage.sha256("a.bin") == hashlib.sha256(content[:size]).hexdigest()


@pytest.mark.parametrize("action", ["read", "sha256", "read_json"])
def test_a_missing_file_is_told_with_its_path(storage: Storage, action: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin"):
        getattr(storage, action)("nowhere.bin")


def test_a_storage_pickles_as_its_address(storage: Storage) -> None:
    storage.write("a.bin", b"1")
    again = pickle.loads(pickle.dumps(storage))  # noqa: S301
    assert (again.uri, again.root) == (storage.uri, storage.root)
    assert again.read("a.bin") == b"1"
    again.write("b.bin", b"2")
    assert storage.read("b.bin") == b"2"


def test_a_relative_folder_becomes_absolute_before_it_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(Storage("run"))
    Storage("run").write("a.bin", b"1")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(packed).read("a.bin") == b"1"  # noqa: S301


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Storage("~/runs").write("a.bin", b"1")
    assert (tmp_path / "runs" / "a.bin").read_bytes() == b"1"


@pytest.mark.parametrize("suffix", ["", "/"])
def test_file_addresses_name_the_same_folder(tmp_path: Path, suffix: str) -> None:
    storage = Storage(f"file://{tmp_path}/run{suffix}")
    storage.write("b/a.bin", b"1")
    assert Storage(str(tmp_path / "run")).read("b/a.bin") == b"1"
    assert storage.names("b") == storage.names("") == ["b/a.bin"]
    assert storage.within("b").read("a.bin") == b"1"


@pytest.mark.parametrize("name", ["with space", "per%20cent", "hash#tag", "ques?tion", "plus+", "ümläut", "a:b"])
def test_folders_of_any_name_are_taken_literally(tmp_path: Path, name: str) -> None:
    storage = Storage(str(tmp_path / name))
    storage.write("b/a.bin", b"1")
    assert (tmp_path / name / "b" / "a.bin").read_bytes() == b"1"
    assert storage.names("") == ["b/a.bin"]
    assert pickle.loads(pickle.dumps(storage)).within("b").read("a.bin") == b"1"  # noqa: S301


def test_a_folder_within_is_a_storage_of_its_own(storage: Storage) -> None:
    inner = storage.within("x/y")
    inner.write("a.bin", b"1")
    assert storage.read("x/y/a.bin") == b"1"
    assert inner.names("") == ["a.bin"]
    assert storage.within("x").within("y").read("a.bin") == b"1"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=30, deadline=None)
@given(values)
def test_json_survives(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    storage = Storage(str(tmp_path_factory.getbasetemp() / "json"))
    storage.write_json("a.json", value)
    assert storage.read_json("a.json") == value


def test_equal_values_give_equal_json_bytes(storage: Storage) -> None:
    storage.write_json("a.json", {"b": 1, "a": {"d": 2, "c": [3, 4]}})
    storage.write_json("b.json", {"a": {"c": [3, 4], "d": 2}, "b": 1})
    assert storage.read("a.json") == storage.read("b.json")
    storage.write_json("c.json", {"a": {"c": [4, 3], "d": 2}, "b": 1})
    assert storage.read("c.json") != storage.read("a.json")
    assert storage.read("a.json").decode().index('"a"') < storage.read("a.json").decode().index('"b"')


def test_what_json_cannot_hold_leaves_no_file(storage: Storage) -> None:
    with pytest.raises(TypeError):
        storage.write_json("a.json", {"a": {1, 2}})
    assert storage.names("") == []


def test_a_folder_is_deleted_with_all_it_holds_or_was_not_there(storage: Storage) -> None:
    storage.write("a/b/c.bin", b"1")
    storage.write("d.bin", b"2")
    storage.delete_folder("a")
    storage.delete_folder("a")
    assert storage.names("") == ["d.bin"]


@pytest.mark.parametrize("uri", ["runs/one", "file:///runs/one", "s3://bucket/runs/one?region=us-east-1"])
def test_a_folder_knows_its_name_and_its_parent_with_the_options_of_the_address(uri: str) -> None:
    storage = Storage(uri)
    assert storage.name == "one"
    assert storage.parent.within("one").uri == storage.uri
    assert storage.parent.name == "runs"


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("ftp://host/runs", "ftp"),
        ("s3://my bucket/runs", "parse"),
        ("s3//bucket/runs", "without ://"),
        ("s3:/bucket/runs", "without ://"),
        ("file:/tmp/runs", "without ://"),
        ("file:///tmp/my runs", "parse"),
    ],
)
def test_addresses_that_tell_no_file_system_are_refused(uri: str, found: str) -> None:
    with pytest.raises(StorageError, match=rf"{found}[\s\S]*needed: a local path, or an address such as s3://"):
        Storage(uri)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file is a file\n  needed: a folder"):
        Storage(str(tmp_path / "file")).within("small").check()
    Storage(str(tmp_path / "new")).within("small").check()
    assert files_below(tmp_path) == ["file"]
    assert not (tmp_path / "new").exists()
    with pytest.raises(StorageError, match=r"/proc/runs[\s\S]*may be written"):
        Storage("/proc/runs").write("a", b"")


def test_folders_whose_names_only_begin_like_an_address_are_folders(tmp_path: Path) -> None:
    for name in ("s3/runs", "files", "gs"):
        Storage(str(tmp_path / name)).write("a", b"x")
        assert (tmp_path / name / "a").exists()
        assert Storage(name).uri.endswith(f"/{name}")
