"""Stanford Cars from small files in the published formats: what is read, and what is refused."""
import hashlib
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from local_mirror import Mirror
from PIL import Image

from nbutils import car_files
from nbutils.car_files import load_cars
from nbutils.files import ChecksumError, DownloadError
from nbutils.pictures import PictureError

CLASSES = {"train": [14, 3, 196, 1, 1, 20], "test": [2, 3, 5, 7]}
LEVELS = {"train": [0, 10, 20, 30, 40, 50], "test": [100, 110, 120, 130]}
NAMES = [f"Car {i} 2012" for i in range(1, 197)]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A data set of ten pictures, no checksums, and no way to the network."""
    monkeypatch.setattr(car_files, "_COUNTS", {"train": 6, "test": 4})
    monkeypatch.setattr(car_files, "_SHA256", {})
    for name in "_PARQUET_URL", "_ARCHIVE_URL":
        monkeypatch.setattr(car_files, name, "http://127.0.0.1:9/{}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NBUTILS_DATA", str(tmp_path))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "stanford-cars"
    path.mkdir()
    return path


def jpeg(level, w=48, h=36):
    file = io.BytesIO()
    Image.new("RGB", (w, h), (level,) * 3).save(file, "JPEG")
    return file.getvalue()


def annotations(classes):
    """As in the originals: a struct array with a box, a class and a name."""
    savemat = pytest.importorskip("scipy.io").savemat
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    rows = np.zeros((1, len(classes)), dtype=[(f, "O") for f in fields])
    for i, c in enumerate(classes):
        rows[0, i] = (1, 2, 30, 40, c, f"{i + 1:05}.jpg")
    file = io.BytesIO()
    savemat(file, {"annotations": rows})
    return file.getvalue()


def meta(names=NAMES):
    savemat = pytest.importorskip("scipy.io").savemat
    file = io.BytesIO()
    cells = np.empty((1, len(names)), dtype=object)
    cells[0] = names
    savemat(file, {"class_names": cells})
    return file.getvalue()


def tgz(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


def jpegs(split):
    return {f"cars_{split}/{i + 1:05}.jpg": jpeg(level) for i, level in enumerate(LEVELS[split])}


def originals(folder, **changed):
    """The files as published; `changed` replaces the content of an archive."""
    for split in CLASSES:
        tgz(folder / f"cars_{split}.tgz", changed.get(split, jpegs(split)))
    tgz(folder / "car_devkit.tgz", changed.get("devkit", {
        "devkit/cars_train_annos.mat": annotations(CLASSES["train"]),
        "devkit/cars_test_annos.mat": b"without labels", "devkit/cars_meta.mat": meta()}))
    (folder / "cars_test_annos_withlabels.mat").write_bytes(
        changed.get("labels", annotations(CLASSES["test"])))
    return folder


def parquet(path, classes, levels, names=NAMES, columns=("image", "label")):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    images = [{"bytes": jpeg(v) if isinstance(v, int) else v, "path": None} for v in levels]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([(columns[0], image_type), (columns[1], pa.int64())])
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(info)})
    labels = [c - 1 if c is not None else None for c in classes]
    pq.write_table(pa.Table.from_pydict({columns[0]: images, columns[1]: labels}, schema), path,
                   row_group_size=2)


def parquets(folder, changed=None, **options):
    """The four files; `changed` maps a split to (classes, levels)."""
    for split in CLASSES:
        classes, levels = (changed or {}).get(split, (CLASSES[split], LEVELS[split]))
        half = len(classes) // 2
        for i, part in enumerate((slice(half), slice(half, None))):
            parquet(folder / f"{split}-{i:05}-of-00002.parquet", classes[part], levels[part], **options)
    return folder


def check(pair, names=NAMES):
    for split, images in zip(("train", "test"), pair, strict=True):
        assert (images.y + 1).tolist() == CLASSES[split] and images.name == f"cars {split}"
        assert images.x.shape[1:] == (3, 24, 32) and images.classes == tuple(names)
        for x, level in zip(images.x, LEVELS[split], strict=True):
            assert (x.int() - level).abs().max() <= 1


# --- what is read --------------------------------------------------------------------------------
def test_the_originals(folder):
    originals(folder)
    check(load_cars(side=24, download=False))
    assert (folder.parent / "stanford-cars-24x32.pt").exists()


def test_the_originals_in_any_order_and_with_what_systems_add(folder):
    train = dict(reversed(jpegs("train").items())) | {"cars_train/._00001.jpg": b"x", "cars_train/readme": b"x"}
    originals(folder, train=train)
    check(load_cars(side=24, download=False))


def test_the_originals_unpacked(folder):
    originals(folder)
    for path in sorted(folder.glob("*.tgz")):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
        path.unlink()
    check(load_cars(side=24, download=False))


def test_without_the_devkits_names_classes_are_numbers(folder):
    originals(folder, devkit={"devkit/cars_train_annos.mat": annotations(CLASSES["train"])})
    check(load_cars(side=24, download=False), [str(i) for i in range(1, 197)])


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_files(folder, below):
    (folder / below).mkdir(exist_ok=True)
    parquets(folder / below)
    check(load_cars(side=24, download=False))


def test_parquet_files_without_names(folder):
    parquets(folder, names=None)
    check(load_cars(side=24, download=False), [str(i) for i in range(1, 197)])


def one_archive(folder, monkeypatch, more=None):
    more = {f"stanford-cars/{name}": raw for name, raw in (more or {}).items()}
    both = {f"stanford-cars/{name}": raw for s in CLASSES for name, raw in jpegs(s).items()}
    path = tgz(folder / "stanford-cars.tgz", both | more)
    monkeypatch.setattr(car_files, "_ARCHIVE_BYTES", path.stat().st_size)
    return path


def test_one_archive_with_its_annotations(folder, monkeypatch):
    one_archive(folder, monkeypatch, {
        "devkit/cars_train_annos.mat": annotations(CLASSES["train"]),
        "cars_test_annos_withlabels.mat": annotations(CLASSES["test"]), "cars_meta.mat": meta()})
    check(load_cars(side=24, download=False))


def test_one_archive_with_the_annotations_beside_it(folder, monkeypatch):
    one_archive(folder, monkeypatch)
    with pytest.raises(FileNotFoundError, match="cars_train_annos.mat and cars_test_annos_withlabels.mat are not in"):
        load_cars(side=24, download=False)
    (folder / "cars_train_annos.mat").write_bytes(annotations(CLASSES["train"]))
    (folder / "cars_test_annos_withlabels.mat").write_bytes(annotations(CLASSES["test"]))
    check(load_cars(side=24, download=False), [str(i) for i in range(1, 197)])


def test_the_originals_come_before_the_rest(folder):
    originals(folder)
    for name in sum(car_files._PARQUET.values(), ["stanford-cars.tgz"]):
        (folder / name).write_bytes(b"never read")
    check(load_cars(side=24, download=False))


def test_the_kept_copy_needs_no_source(folder):
    originals(folder)
    load_cars(side=24, download=False)
    for path in folder.iterdir():
        path.unlink()
    check(load_cars(folder.parent, side=24, download=False))
    with pytest.raises(FileNotFoundError, match="nor the four parquet files, nor stanford-cars.tgz"):
        load_cars(side=20, download=False)


def test_a_small_chunk_gives_the_same(folder, monkeypatch):
    originals(folder)
    pictures = list(enumerate([jpeg(v) for v in LEVELS["train"]]))
    stream = [(5 - i, str(i), raw) for i, raw in pictures]
    small, large = (car_files._decode_stream(iter(stream), 6, 24, 4 / 3, chunk) for chunk in (2, 100))
    assert torch.equal(small, large) and (small[0].int() - 50).abs().max() <= 1


# --- what is refused -----------------------------------------------------------------------------
def test_missing_and_extra_and_broken_pictures_are_all_named(folder):
    pictures = jpegs("train")
    originals(folder, train={k: v for k, v in pictures.items() if k[-5] not in "25"})
    with pytest.raises(PictureError, match="2 pictures are missing in .*cars_train.tgz") as caught:
        load_cars(side=24, download=False)
    assert list(caught.value.failed) == ["cars_train/00002.jpg", "cars_train/00005.jpg"]
    originals(folder, test=jpegs("test") | {"cars_test/00009.jpg": jpeg(3)})
    with pytest.raises(PictureError, match="1 pictures have no label in .*cars_test.tgz:\n  cars_test/00009.jpg"):
        load_cars(side=24, download=False)
    originals(folder, test=jpegs("test") | {"cars_test/00002.jpg": b"?", "cars_test/00004.jpg": jpeg(9)[:300]})
    with pytest.raises(PictureError, match="2 pictures of Stanford Cars cannot be decoded") as caught:
        load_cars(side=24, download=False)
    assert list(caught.value.failed) == ["cars_test/00002.jpg", "cars_test/00004.jpg"]
    assert not (folder.parent / "stanford-cars-24x32.pt").exists()


def test_labels_are_one_to_196(folder):
    originals(folder, labels=annotations([2, 0, 5, 197]))
    with pytest.raises(PictureError, match="2 labels in cars_test_annos_withlabels.mat are not in 1 to 196") as caught:
        load_cars(side=24, download=False)
    assert caught.value.failed == {"00002.jpg": "class 0", "00004.jpg": "class 197"}


def test_counts_and_names_of_annotations(folder):
    originals(folder, labels=annotations([2, 3, 5]))
    with pytest.raises(ValueError, match="cars_test_annos_withlabels.mat has 3 rows, not 4"):
        load_cars(side=24, download=False)
    files = {"devkit/cars_train_annos.mat": annotations(CLASSES["train"]), "devkit/cars_meta.mat": meta(NAMES[:5])}
    originals(folder, devkit=files)
    with pytest.raises(ValueError, match="cars_meta.mat has 5 class names, not 196"):
        load_cars(side=24, download=False)


def test_an_original_that_is_another_file(folder, monkeypatch):
    originals(folder)
    right = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(car_files, "_SHA256", right)
    check(load_cars(side=24, download=False))
    for name in right:
        for kept in folder.parent.glob("*.pt"):
            kept.unlink()
        monkeypatch.setattr(car_files, "_SHA256", right | {name: "0" * 64})
        with pytest.raises(ChecksumError, match=name):
            load_cars(side=24, download=False)


def test_an_archive_that_is_cut_short(folder, monkeypatch):
    path = one_archive(folder, monkeypatch)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="bytes, not .*delete it"):
        load_cars(side=24, download=False)
    (folder / "cars_train_annos.mat").write_bytes(annotations(CLASSES["train"]))
    (folder / "cars_test_annos_withlabels.mat").write_bytes(annotations(CLASSES["test"]))
    monkeypatch.setattr(car_files, "_ARCHIVE_BYTES", path.stat().st_size)
    with pytest.raises(ValueError, match="stanford-cars.tgz is damaged or cut short"):
        load_cars(side=24, download=False)


def test_parquet_files_that_are_wrong(folder):
    parquets(folder, {"test": ([2, 3, 5, 7, 9], [1, 2, 3, 4, 5])})
    with pytest.raises(ValueError, match=r"test-00000.* and test-00001.* have 2 \+ 3 rows, not 4"):
        load_cars(side=24, download=False)
    parquets(folder, {"test": ([2, 197, 5, None], [1, 2, 3, 4])})
    with pytest.raises(PictureError, match="2 labels are not in 0 to 195") as caught:
        load_cars(side=24, download=False)
    assert caught.value.failed == {"test row 1": "label 196", "test row 3": "label None"}
    parquets(folder, {"train": (CLASSES["train"], [0, b"?", 20, 30, None, 50])})
    with pytest.raises(PictureError, match="2 pictures of Stanford Cars") as caught:
        load_cars(side=24, download=False)
    assert list(caught.value.failed) == ["train row 1", "train row 4"]
    parquets(folder, columns=("img", "label"))
    with pytest.raises(ValueError, match="needs the columns image and label; it has img, label"):
        load_cars(side=24, download=False)
    (folder / "train-00000-of-00002.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="train-00000-of-00002.parquet is damaged or cut short"):
        load_cars(side=24, download=False)


def test_missing_packages_are_named_with_their_command(folder, monkeypatch):
    originals(folder)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        load_cars(side=24, download=False)
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        load_cars(side=24)                      # before anything is fetched
    assert not list(folder.iterdir())


def test_a_size_that_is_refused(folder):
    with pytest.raises(ValueError, match="give a whole number"):
        load_cars(side=0)


# --- the network ---------------------------------------------------------------------------------
@pytest.fixture
def mirror(folder):
    parquet(folder / "one", [1, 2], [10, 20])
    content = (folder / "one").read_bytes()
    (folder / "one").unlink()
    with Mirror(content, piece=len(content) // 3) as mirror:
        yield mirror


def address(mirror, word, name="{}"):
    return mirror.url(word, name)


@pytest.mark.parametrize("word", ["whole", "cut", "rangeless", "lengthless"])
def test_parquet_files_are_fetched_and_continued(folder, mirror, monkeypatch, word):
    monkeypatch.setattr(car_files, "_COUNTS", {"train": 4, "test": 4})
    monkeypatch.setattr(car_files, "_PARQUET_URL", address(mirror, word))
    train, test = load_cars(side=24)
    assert train.y.tolist() == test.y.tolist() == [0, 1, 0, 1]
    assert sorted(p.name for p in folder.glob("*.parquet")) == sorted(sum(car_files._PARQUET.values(), []))
    assert sum(sent for _, _, sent in mirror.log) == 4 * len(mirror.content), "no byte twice"


def test_a_complete_part_is_fetched_anew_once(folder, mirror):
    path = folder / "file"
    (folder / "file.part").write_bytes(b"x" * len(mirror.content))
    car_files._fetch_plain(mirror.url("whole"), path)
    assert path.read_bytes() == mirror.content and [asked for _, asked, _ in mirror.log] == [len(mirror.content), None]


def test_an_archive_of_another_length_is_thrown_away(folder, mirror):
    with pytest.raises(DownloadError, match=r"it has [\d,]+ bytes, not 7"):
        car_files._fetch_plain(mirror.url("whole"), folder / "file", size=7)
    assert not list(folder.glob("file.part")) and not (folder / "file").exists()


def test_what_came_is_kept_for_the_next_call(folder, mirror):
    with pytest.raises(DownloadError, match="503"):
        car_files._fetch_plain(mirror.url("once"), folder / "file")
    assert (folder / "file.part").stat().st_size == mirror.piece
    car_files._fetch_plain(mirror.url("whole"), folder / "file")
    assert (folder / "file").read_bytes() == mirror.content and mirror.log[-1][1] == mirror.piece


def test_the_archive_is_next_and_all_reasons_are_told(folder, mirror, monkeypatch, tmp_path):
    monkeypatch.setattr(car_files, "_PARQUET_URL", address(mirror, "gone"))
    monkeypatch.setattr(car_files, "_ARCHIVE_URL", mirror.url("away", "archive"))
    with pytest.raises(DownloadError, match="(?s)train-00000.*gone: .*404.*archive/away: .*404.*Put the file there"):
        load_cars(side=24)
    made = one_archive(tmp_path, monkeypatch, {
        "cars_train_annos.mat": annotations(CLASSES["train"]),
        "cars_test_annos_withlabels.mat": annotations(CLASSES["test"]), "cars_meta.mat": meta()})
    mirror.content = made.read_bytes()
    monkeypatch.setattr(car_files, "_ARCHIVE_URL", mirror.url("cut", "archive"))
    check(load_cars(side=24))
