"""The .npz source: rows, shapes, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_npz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opened_sources import refusal, source_at

from fedfactory_ray.data.readers import ArrayFile
from fedfactory_ray.data.source import inspect
from fedfactory_ray.data.transforms import resize_batch
from fedfactory_ray.errors import DataInvalidError, DataMissingError

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("npz")
    return {channels: write_npz(folder / f"{channels}.npz", channels=channels) for channels in (1, 3)}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 119), max_size=20), st.sampled_from([1, 3]), st.booleans())
def test_array_file_reads_the_rows_asked_for_in_the_asked_order(
    small_files: dict[int, Path], asked: list[int], channels: int, ready: bool
) -> None:
    source = source_at(small_files[channels]) if ready else ArrayFile(small_files[channels], None)
    with np.load(small_files[channels]) as arrays:
        images = arrays["train_images"]
    indices = np.array(asked, dtype=np.int64)
    assert np.array_equal(source.images("train", indices), images[indices])
    assert np.array_equal(source.images("train"), images)


@pytest.fixture(scope="module")
def file_of_three_chunks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Rows of 256 KiB: 64 of them make one of the pieces in which a file is read."""
    n, side = 140, 512
    images = np.zeros((n, side, side), np.uint8)
    images[:, 0, 0], images[:, 5, 7], images[:, -1, -1] = np.arange(n), 255 - np.arange(n), np.arange(n)
    labels = np.arange(n) % 2
    path = tmp_path_factory.mktemp("large") / "large.npz"
    few = slice(0, 4)
    np.savez(path, train_images=images, train_labels=labels, test_images=images[few, :, :], test_labels=labels[few])
    return path, images


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([0, 1, 62, 63, 64, 65, 127, 128, 129, 139]), max_size=12))
def test_array_file_reads_across_its_pieces(file_of_three_chunks: tuple[Path, np.ndarray], asked: list[int]) -> None:
    path, images = file_of_three_chunks
    indices = np.array(asked, dtype=np.int64)
    assert np.array_equal(ArrayFile(path, None).images("train", indices)[..., 0], images[indices])


def test_array_file_reads_all_of_several_pieces(file_of_three_chunks: tuple[Path, np.ndarray]) -> None:
    path, images = file_of_three_chunks
    assert np.array_equal(ArrayFile(path, None).images("train")[..., 0], images)


def test_array_file_facts_and_labels(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", classes=4, n=10, channels=3)
    source = source_at(path)
    info, labels = inspect(source)
    assert (info.class_names, info.resolution, info.channels) == (["0", "1", "2", "3"], 8, 3)
    assert info.counts == {"train": [10] * 4, "val": [5] * 4, "test": [5] * 4}
    with np.load(path) as arrays:
        assert np.array_equal(labels, arrays["train_labels"].ravel())
    assert labels.dtype == np.int64
    assert source.image_shape() == source.images("test").shape[1:] == (8, 8, 3)


def test_grey_images_without_a_channel_axis_get_one(tmp_path: Path) -> None:
    with np.load(write_npz(tmp_path / "a.npz")) as arrays:
        flat = {key: value[..., 0] if key.endswith("images") else value.ravel() for key, value in arrays.items()}
        images = arrays["train_images"]
    np.savez(tmp_path / "b.npz", **flat)
    source = source_at(tmp_path / "b.npz")
    info, _ = inspect(source)
    assert (info.resolution, info.channels) == (8, 1)
    assert np.array_equal(source.images("train"), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_array_file_takes_the_resolution(tmp_path: Path, channels: int) -> None:
    path = write_npz(tmp_path / "a.npz", channels=channels)
    source = source_at(path, resolution=12)
    info, _ = inspect(source)
    assert info.resolution == 12
    picked = source.images("train", np.array([5, 2]))
    assert np.array_equal(picked, resize_batch(source_at(path).images("train"), 12)[[5, 2]])


def test_a_resolution_makes_oblong_images_square(tmp_path: Path) -> None:
    oblong = {f"{split}_images": np.full((n * 3, 8, 10, 1), 9, np.uint8) for split, n in (("train", 40), ("test", 20))}
    path = write_npz(tmp_path / "a.npz", **oblong, val_images=np.zeros((60, 8, 10, 1), np.uint8))
    assert "images of 8×10" in refusal(path)
    info, _ = inspect(source_at(path, resolution=8))
    assert info.resolution == 8
    assert source_at(path, resolution=8).images("test").shape == (60, 8, 8, 1)


@pytest.mark.parametrize("resolution", [None, 12])
def test_a_missing_val_split_is_empty(tmp_path: Path, resolution: int | None) -> None:
    with np.load(write_npz(tmp_path / "a.npz")) as arrays:
        np.savez(tmp_path / "b.npz", **{key: value for key, value in arrays.items() if not key.startswith("val")})
    source = source_at(tmp_path / "b.npz", resolution=resolution)
    info, _ = inspect(source)
    assert source.labels("val").tolist() == []
    assert source.labels("val").dtype == np.int64
    assert info.counts["val"] == [0, 0, 0]
    assert len(source.images("val")) == 0


def test_a_missing_file_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError) as error:
        source_at(tmp_path / "nowhere.npz")
    assert str(tmp_path / "nowhere.npz") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_files_that_are_no_npz_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert "corrupt" in message


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, kept: float) -> None:
    content = write_npz(tmp_path / "a.npz").read_bytes()
    path = tmp_path / "b.npz"
    path.write_bytes(content[: int(kept * len(content))])
    message = refusal(path)
    assert str(path) in message
    assert "corrupt" in message


def _everything(path: Path) -> tuple[bytes, ...]:
    source = source_at(path)
    inspect(source)
    used = ("train", "test")
    return (*(source.labels(s).tobytes() for s in used), *(source.images(s).tobytes() for s in used))


@pytest.mark.parametrize("packed", [True, False])
def test_damaged_files_are_refused_or_read_as_they_were(tmp_path: Path, packed: bool) -> None:
    path, damaged = tmp_path / "a.npz", tmp_path / "b.npz"
    with np.load(write_npz(path, n=6, classes=2)) as arrays:
        held = dict(arrays)
    (np.savez_compressed if packed else np.savez)(path, **held)
    intact, content = _everything(path), path.read_bytes()
    refused, misread, crashed = 0, [], []
    for place in range(0, len(content), max(1, len(content) // 250)):
        for bit in (0, 4):
            spoilt = bytearray(content)
            spoilt[place] ^= 1 << bit
            damaged.write_bytes(spoilt)
            try:
                if _everything(damaged) != intact:
                    misread.append((place, bit))
            except DataInvalidError as error:
                assert str(damaged) in str(error)
                refused += 1
            except Exception as error:  # noqa: BLE001
                crashed.append((place, bit, repr(error)[:60]))
    assert refused
    assert not crashed, f"{len(crashed)} damages ended otherwise: {crashed[:5]}"
    assert not misread, f"{len(misread)} damages went unnoticed: {misread[:5]}"


def images_like(split: str, **changes: object) -> dict[str, np.ndarray]:
    n = 120 if split == "train" else 60
    shape = tuple(changes.get("shape", (8, 8, 1)))  # type: ignore[arg-type]
    return {f"{split}_images": np.zeros((n, *shape), changes.get("dtype", np.uint8))}  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"test_labels": np.arange(60) % 4}, "test labels from 0 to 3"),
        ({"test_labels": np.arange(60) % 3 - 1}, "test labels from -1 to 1"),
        ({"train_labels": np.arange(120) % 3 - 1}, "train labels from -1 to 1"),
        ({"val_labels": np.arange(60) % 9}, "val labels from 0 to 8"),
        (images_like("train", dtype=np.float32), "train_images float32"),
        (images_like("test", dtype=np.float64), "test_images float64"),
        (images_like("train", dtype=np.uint16), "train_images uint16"),
        (images_like("test", shape=(8, 8, 3)), r"images of mixed shapes [(8, 8, 1), (8, 8, 3)]"),
        (images_like("val", shape=(9, 9, 1)), r"images of mixed shapes [(8, 8, 1), (9, 9, 1)]"),
        ({**images_like("train", shape=(8, 8, 2)), **images_like("test", shape=(8, 8, 2))}, "mixed shapes"),
        ({"train_images": np.zeros((120, 64), np.uint8)}, "train_images uint8 (120, 64)"),
        ({"train_labels": np.arange(120) % 2 * 2}, "no training image of class 1"),
        ({"train_labels": np.zeros((120, 2), np.int64)}, "train_labels int64 (120, 2)"),
        ({"train_labels": np.arange(120) % 3 / 2}, "train_labels float64 (120,)"),
        ({"test_labels": np.zeros((0, 1), np.int64), "test_images": np.zeros((0, 8, 8, 1), np.uint8)}, "no test"),
        ({"train_images": np.array([None] * 120)}, "train_images as object"),
        ({"train_labels": np.array([0, 1, 2] * 40, dtype=object)}, "train_labels as object"),
        ({"train_images": np.asfortranarray(np.zeros((120, 8, 8, 1), np.uint8))}, "train_images in Fortran order"),
    ],
)
def test_unusable_arrays_are_refused_with_what_was_found(
    tmp_path: Path, changes: dict[str, np.ndarray], found: str
) -> None:
    path = write_npz(tmp_path / "a.npz", **changes)
    message = refusal(path)
    assert str(path) in message
    assert found in message


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("n", [7, 500])
def test_other_numbers_of_images_than_labels_are_refused(tmp_path: Path, split: str, n: int) -> None:
    path = write_npz(tmp_path / "a.npz", **{f"{split}_images": np.zeros((n, 8, 8, 1), np.uint8)})
    message = refusal(path)
    assert str(path) in message
    assert f"{split}_images" in message


def test_two_channels_are_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", channels=2)
    assert "images of 8×8 with 2 channels" in refusal(path)


@pytest.mark.parametrize("missing", ["train_images", "train_labels", "test_images", "test_labels", "val_images"])
def test_missing_arrays_are_refused_by_name(tmp_path: Path, missing: str) -> None:
    with np.load(write_npz(tmp_path / "a.npz")) as arrays:
        np.savez(tmp_path / "b.npz", **{key: value for key, value in arrays.items() if key != missing})
    message = refusal(tmp_path / "b.npz")
    assert str(tmp_path / "b.npz") in message
    assert missing in message
