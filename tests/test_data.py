"""Images, CIFAR-10's files, augmentation and batches: what the chapter cannot check about itself."""
import hashlib
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from local_mirror import Mirror

from nbutils import data
from nbutils.data import (CIFAR10_MEAN, CIFAR10_STD, Batches, Images, load_cifar10, load_digits,
                          mean_std, normalize, pad_crop_flip)
from nbutils.files import ChecksumError, DownloadError, data_home

NAMES = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]


def some_images(n=50, channels=3, side=8, name="some"):
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(256, (n, channels, side, side), dtype=torch.uint8, generator=draw)
    return Images(x, torch.arange(n) % 10, tuple("0123456789"), name)


# Images

def test_images():
    images = some_images()
    assert len(images) == 50 and "some: 50 of 3x8x8, 10 classes, cpu" in repr(images)
    assert images.to("cpu").x is images.x, "nothing is copied without need"
    assert len(images.take(7)) == 7 and torch.equal(images.take(7).x, images.x[:7])
    index = torch.tensor([4, 4, 0])
    assert torch.equal(images.take(index).y, index) and images.take(index).name == "some"
    assert len(images.take(slice(10, None))) == 40 and len(images.take(0)) == 0
    for wrong in 51, -1:
        with pytest.raises(ValueError, match=f"some has 50 images, not {wrong}"):
            images.take(wrong)
    with pytest.raises(AttributeError):
        images.x = None


X, Y = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("x, y, error, match", [
    (X.float(), Y, TypeError, "x must be uint8 .* torch.float32"),
    (X, Y.int(), TypeError, "y int64, .* torch.int32"),
    (X[0], Y, ValueError, r"\[3, 8, 8\]"),
    (X, Y[:3], ValueError, r"\[4, 3, 8, 8\] and \[3\]"),
    (X, Y[:, None], ValueError, r"\[4, 1\]"),
    (X, Y + 2, ValueError, "2 classes, but labels from 2 to 2"),
    (X, Y - 1, ValueError, "labels from -1"),
    (X.to("meta"), Y, ValueError, "x is on meta and y on cpu"),
])
def test_wrong_images_are_refused_by_name(x, y, error, match):
    with pytest.raises(error, match=match) as caught:
        Images(x, y, ("a", "b"), "pets")
    assert str(caught.value).startswith("pets: ")


# Digits

def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits as theirs

    train, valid = load_digits()
    images, labels = theirs(return_X_y=True)
    assert (len(train), len(valid)) == (1437, 360)
    x = torch.cat([train.x, valid.x]).view(1797, 64)
    assert torch.equal((x.double() * 16 / 255).round(), torch.from_numpy(images))
    assert torch.equal(torch.cat([train.y, valid.y]), torch.from_numpy(labels))
    assert valid.y.bincount().min() > 30, "each class is in the validation set"


def run_python(program, *args):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def test_nothing_heavy_is_imported():
    program = ("import sys; from nbutils.data import load_digits; load_digits()\n"
               "print({'sklearn', 'torchvision', 'matplotlib', 'fastprogress'} & {*sys.modules})")
    assert finish(run_python(program)) == "set()\n"


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_digits()


# Statistics and normalization

def test_mean_std_is_the_populations():
    images = some_images()
    mean, std = mean_std(images)
    pixels = images.x.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(std).double(), pixels.std((0, 2, 3), correction=0),
                               rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6),
                                         (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalize(dtype, atol, channels_last):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    z = normalize(x, CIFAR10_MEAN, CIFAR10_STD, dtype, channels_last)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    exact = (x.double() / 255 - mean) / std
    assert z.dtype == dtype
    assert z.is_contiguous(memory_format=torch.channels_last if channels_last
                           else torch.contiguous_format)
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=atol)
    if dtype.itemsize == 2:  # rounded once: nothing nearer exists
        assert torch.equal(z, exact.to(dtype)) or (z.double() - exact).abs().max() <= \
            (exact.to(dtype).double() - exact).abs().max() * 1.001


def test_normalize_refuses():
    with pytest.raises(TypeError, match="uint8 images, not torch.float32"):
        normalize(X.float(), CIFAR10_MEAN, CIFAR10_STD)
    with pytest.raises(ValueError, match="3 channels, but mean has 1 and std 3"):
        normalize(X, (0.5,), CIFAR10_STD)
    with pytest.raises(ValueError, match="std must be positive"):
        normalize(X, CIFAR10_MEAN, (0.2, 0, 0.2))


# CIFAR-10: files in the official format, ten images each

class Touch:
    """A pickle that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def batch(k):
    x = some_images(60, 3, 32).x[10 * k:10 * k + 10].reshape(10, -1).numpy()
    return {b"batch_label": f"batch {k}".encode(), b"labels": [(3 * k + i) % 10 for i in range(10)],
            b"data": x, b"filenames": [f"image_{i}.png".encode() for i in range(10)]}


@pytest.fixture
def files():
    contents = [batch(k) for k in range(6)] + [{
        b"num_cases_per_batch": 10, b"num_vis": 3072,
        b"label_names": [f"class {i}".encode() for i in range(10)]}]
    return {name: pickle.dumps(c, protocol=2) for name, c in zip(NAMES, contents)}


def unpacked(root, files):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def packed(root, files):
    unpacked(root, files | {"readme.html": b"<html></html>"})
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root / "cifar-10-batches-py", arcname="cifar-10-batches-py")
    shutil.rmtree(root / "cifar-10-batches-py")
    return path


@pytest.fixture
def small(monkeypatch, files, tmp_path):
    """CIFAR-10 is now our six small batches; their archive is in the folder origin."""
    sums = {name: hashlib.md5(files[name]).hexdigest() for name in NAMES}
    (tmp_path / "origin").mkdir()
    archive = packed(tmp_path / "origin", files)
    monkeypatch.setattr(data, "_CIFAR10_MD5", sums)
    monkeypatch.setattr(data, "_CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "CIFAR10_URLS", ("http://127.0.0.1:9/refused",))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return archive


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def check(sets):
    train, test = sets
    x = some_images(60, 3, 32).x
    assert torch.equal(train.x, x[:50]) and torch.equal(test.x, x[50:])
    assert train.y.tolist() == [(3 * k + i) % 10 for k in range(5) for i in range(10)]
    assert test.y.tolist() == [(15 + i) % 10 for i in range(10)]
    assert train.classes == test.classes == tuple(f"class {i}" for i in range(10))
    assert (train.name, test.name) == ("cifar10 train", "cifar10 test")
    assert train.x.is_contiguous() and train.y.dtype == torch.int64


def test_from_a_folder(small, root, files):
    unpacked(root, files)
    check(load_cifar10(root))
    check(load_cifar10(str(root), download=False))


def test_from_an_archive(small, root):
    shutil.copy(small, root)
    check(load_cifar10(root, download=False))
    assert sorted(p.name for p in root.iterdir()) == ["cifar-10-python.tar.gz", "cifar10.pt",
                                                      "cifar10.pt.lock"], "nothing was unpacked"


def test_from_a_mirror_into_a_new_folder(small, root, monkeypatch):
    with Mirror(small.read_bytes(), piece=10_000) as mirror:
        monkeypatch.setattr(data, "CIFAR10_URLS", (mirror.url("gone"), mirror.url("cut")))
        monkeypatch.setenv("NBUTILS_DATA", str(root / "new"))
        check(load_cifar10())
    assert (root / "new/cifar-10-python.tar.gz").read_bytes() == small.read_bytes()


def test_the_decoded_copy_is_enough(small, root, files):
    folder = unpacked(root, files)
    check(load_cifar10(root))
    shutil.rmtree(folder)
    check(load_cifar10(root, download=False))


def test_another_sets_copy_is_not_used(small, root, files, monkeypatch):
    folder = unpacked(root, files)
    load_cifar10(root)
    again = pickle.dumps(batch(5) | {b"labels": [0] * 10}, protocol=2)
    (folder / "test_batch").write_bytes(again)
    sums = data._CIFAR10_MD5 | {"test_batch": hashlib.md5(again).hexdigest()}
    monkeypatch.setattr(data, "_CIFAR10_MD5", sums)
    assert load_cifar10(root)[1].y.tolist() == [0] * 10


def test_nothing_there_and_no_download(small, root):
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py nor .* NBUTILS_DATA"):
        load_cifar10(root, download=False)


def test_no_network(small, root):
    with pytest.raises(DownloadError) as caught:
        load_cifar10(root)
    assert f"by hand: {root / 'cifar-10-python.tar.gz'}" in str(caught.value)
    assert data._CIFAR10_SHA256 in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "bomb", "another", "empty"])
def test_a_damaged_file_is_named_and_never_unpickled(small, root, files, name, damage):
    raw = bytearray(files[name])
    if damage == "flipped":
        raw[-100] ^= 1
    bad = {"truncated": raw[:-10], "flipped": raw, "empty": b"",
           "bomb": pickle.dumps(Touch(root / "ran")),
           "another": files[NAMES[NAMES.index(name) - 1]]}[damage]
    unpacked(root, files | {name: bytes(bad)})
    with pytest.raises(ChecksumError) as caught:
        load_cifar10(root)
    assert str(caught.value).startswith(str(root / "cifar-10-batches-py" / name))
    assert data._CIFAR10_MD5[name] in str(caught.value) and "Delete it" in str(caught.value)
    assert not (root / "ran").exists() and not (root / "cifar10.pt").exists()


@pytest.mark.parametrize("damage", ["truncated", "bomb"])
def test_a_damaged_archive_is_named_and_never_opened(small, root, files, damage):
    if damage == "truncated":
        (root / small.name).write_bytes(small.read_bytes()[:-100])
    else:
        packed(root, files | {"data_batch_2": pickle.dumps(Touch(root / "ran"))})
    with pytest.raises(ChecksumError, match="cifar-10-python.tar.gz"):
        load_cifar10(root)
    assert not (root / "ran").exists()


def test_a_mirror_with_a_bomb(small, root, files, tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    evil = packed(tmp_path / "evil", {name: pickle.dumps(Touch(root / "ran")) for name in files})
    with Mirror(evil.read_bytes()) as mirror:
        monkeypatch.setattr(data, "CIFAR10_URLS", (mirror.url("whole"),))
        with pytest.raises(DownloadError, match="wrong bytes"):
            load_cifar10(root)
    assert not (root / "ran").exists() and not (root / small.name).exists()


def test_a_missing_file_is_named(small, root, files):
    folder = unpacked(root, files)
    (folder / "data_batch_3").unlink()
    (folder / "batches.meta").unlink()
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py lacks data_batch_3, batches.meta"):
        load_cifar10(root)


DECODE = """
import json, sys, time
from pathlib import Path
from nbutils import data
data._CIFAR10_MD5 = json.loads(sys.argv[2])
root = Path(sys.argv[1])
while not (root / "start").exists():
    time.sleep(0.001)
for _ in range(5):
    train, test = data.load_cifar10(root, download=False)
    assert (len(train), len(test)) == (50, 10)
    (root / "cifar10.pt").unlink(missing_ok=True)
"""


def test_two_processes_decode_at_once(small, root, files):
    import json

    unpacked(root, files)
    both = [run_python(DECODE, root, json.dumps(data._CIFAR10_MD5)) for _ in range(2)]
    (root / "start").touch()
    for process in both:
        finish(process)
    check(load_cifar10(root, download=False))


# The real files, where they are

def real_folder():
    """The folder with the real CIFAR-10, or None; never downloads."""
    try:
        home = data_home()
        parts = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
        return next((home for part in parts if (home / part).exists()), None)
    except OSError:
        return None


needs_real = pytest.mark.skipif(real_folder() is None, reason=(
    "the real CIFAR-10 is not there: put cifar-10-batches-py or cifar-10-python.tar.gz into "
    f"{data_home()}, or set NBUTILS_DATA"))


@pytest.fixture
def real(tmp_path):
    """A folder that shows the real files, and can be written."""
    for part in ("cifar-10-batches-py", "cifar-10-python.tar.gz"):
        if (real_folder() / part).exists():
            (tmp_path / part).symlink_to(real_folder() / part)
    return tmp_path


@needs_real
def test_the_real_set(real):
    train, test = load_cifar10(real, download=False)
    assert (train.x.shape, test.x.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert train.y.bincount().tolist() == [5000] * 10 and test.y.bincount().tolist() == [1000] * 10
    assert train.classes[:3] == ("airplane", "automobile", "bird")
    assert train.y[:5].tolist() == [6, 9, 9, 4, 1] and test.y[:5].tolist() == [3, 8, 8, 0, 6]
    mean, std = mean_std(train)
    assert tuple(round(m, 5) for m in mean) == CIFAR10_MEAN
    assert tuple(round(s, 5) for s in std) == CIFAR10_STD
    again = load_cifar10(real, download=False)
    assert torch.equal(again[0].x, train.x) and torch.equal(again[1].y, test.y)


@needs_real
def test_a_real_file_cut_short(tmp_path):
    source = real_folder() / "cifar-10-batches-py"
    if not source.is_dir():
        pytest.skip("only the archive is there")
    folder = tmp_path / source.name
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "test_batch").unlink()
    (folder / "test_batch").write_bytes((source / "test_batch").read_bytes()[:-1])
    with pytest.raises(ChecksumError, match="test_batch is damaged.*\n.*40351d587109b95175f43aff81a1287e"):
        load_cifar10(tmp_path)


# Augmentation

def by_definition(image, top, left, flipped, pad, mode):
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)),
                    mode={"zeros": "constant"}.get(mode, mode))
    c, h, w = image.shape
    cut = padded[:, top:top + h, left:left + w]
    return cut[:, :, ::-1] if flipped else cut


@pytest.mark.parametrize("mode", ["symmetric", "reflect", "zeros"])
@pytest.mark.parametrize("pad, size", [(4, (32, 32)), (1, (8, 8)), (0, (5, 5)), (7, (8, 9)), (3, (6, 4))])
def test_every_crop_is_numpys(mode, pad, size):
    places = torch.arange(2 * pad + 1)
    top, left, flipped = torch.cartesian_prod(places, places, torch.arange(2)).unbind(1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (len(top), 3, *size), dtype=torch.uint8, generator=draw)
    ours = data._crop(x, top, left, flipped.bool(), pad, mode)
    slow = [by_definition(*a, pad, mode) for a in zip(x.numpy(), top, left, flipped)]
    assert ours.dtype == torch.uint8 and torch.equal(ours, torch.from_numpy(np.stack(slow)))


def places(offsets, flip=True, n=4000):
    """Top and left moves and flips that pad_crop_flip draws: [n, 2] and [n]."""
    ruler = torch.stack([torch.arange(32).view(-1, 1).expand(32, 32),
                         torch.arange(32).expand(32, 32)]).to(torch.uint8)
    draw = torch.Generator().manual_seed(0)
    out = pad_crop_flip(ruler.expand(n, -1, -1, -1), draw, offsets=offsets, flip=flip).int()
    flipped = out[:, 1, 16, 16] < out[:, 1, 16, 15]
    middle = torch.where(flipped, out[:, 1, 16, 15], out[:, 1, 16, 16])
    return out[:, 0, 16, 16] - 16, middle - 16, flipped


def test_the_rule_of_2018():
    down, across, flipped = places(8)
    for moves in down, across:
        assert sorted(set(moves.tolist())) == list(range(-4, 4))
        assert (moves + 4).bincount().min() > 400, "all eight about equally often"
    assert len({*zip(down.tolist(), across.tolist())}) == 64, "independent of one another"
    assert 1800 < flipped.sum() < 2200
    assert 0.4 < flipped[across == 0].float().mean() < 0.6
    assert not places(8, flip=False)[2].any()
    assert sorted(set(places(9)[0].tolist())) == list(range(-4, 5))


def test_augmentation_depends_on_its_generator_only():
    x = some_images(64, 3, 32).x
    state = torch.get_rng_state()
    first = pad_crop_flip(x, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        again = pad_crop_flip(x, torch.Generator().manual_seed(5))
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(first, again)
    assert not torch.equal(first, pad_crop_flip(x, torch.Generator().manual_seed(6)))


def test_augmentation_of_other_memory_orders():
    x = some_images(16, 3, 32).x
    strided = x.to(memory_format=torch.channels_last)
    for other in strided, x.flip(0).flip(0):
        assert torch.equal(pad_crop_flip(other, torch.Generator().manual_seed(0)),
                           pad_crop_flip(x, torch.Generator().manual_seed(0)))


def test_augmentation_refuses():
    x = some_images().x
    with pytest.raises(ValueError, match="unknown mode 'symetric'.*Did you mean symmetric"):
        pad_crop_flip(x, mode="symetric")
    for pad in 8, -1:
        with pytest.raises(ValueError, match=f"pad={pad} must be less than the sides"):
            pad_crop_flip(x, pad=pad)
    for offsets in 0, 10:
        with pytest.raises(ValueError, match=f"offsets={offsets} must be 1 to 9 for pad=4"):
            pad_crop_flip(x, offsets=offsets)


# Batches

HALF = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def epochs(n=1, **settings):
    """x and y of the next n epochs of fresh Batches."""
    settings = {"shuffle": True, "augment": pad_crop_flip, "batch_size": 16} | HALF | settings
    batches = Batches(settings.pop("images", some_images()), **settings)
    return [[torch.cat(t) for t in zip(*batches)] for _ in range(n)]


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b))


def test_an_epoch_has_each_image_once():
    images = some_images()
    (x, y), = epochs(augment=None)
    assert torch.equal(y.sort()[0], images.y.sort()[0]) and not torch.equal(y, images.y)
    z = normalize(images.x, **HALF)
    found = [(z == one).flatten(1).all(1).nonzero().item() for one in x]
    assert sorted(found) == list(range(50)) and images.y[found].tolist() == y.tolist()


def test_without_shuffling_the_order_stays():
    images = some_images()
    for x, y in epochs(2, shuffle=False, augment=None):
        assert torch.equal(y, images.y) and torch.equal(x, normalize(images.x, **HALF))


def test_lengths():
    images = some_images(50)
    for size, drop_last, sizes in [(16, False, [16, 16, 16, 2]), (16, True, [16] * 3),
                                   (25, False, [25, 25]), (25, True, [25, 25]),
                                   (64, False, [50]), (1, True, [1] * 50)]:
        batches = Batches(images, size, drop_last=drop_last, shuffle=True, **HALF)
        assert len(batches) == len(sizes) and [len(y) for _, y in batches] == sizes
        assert batches.images is images


def test_epochs_depend_on_seed_and_number_only():
    first = epochs(3)
    assert not same(first[0], first[1]) and not same(first[1], first[2])
    torch.manual_seed(99)
    torch.rand(7)
    assert all(same(a, b) for a, b in zip(first, epochs(3)))
    assert not any(same(a, b) for a, b in zip(first, epochs(3, seed=1)))
    assert not same(first[1], epochs(1, seed=1)[0]), "seed and epoch are not just added"


def test_set_epoch():
    first = epochs(4)
    batches = Batches(some_images(), 16, shuffle=True, augment=pad_crop_flip, **HALF)
    for e in 2, 0, 3:
        batches.set_epoch(e)
        assert same(first[e], [torch.cat(t) for t in zip(*batches)])
    batches.set_epoch(1)
    next(iter(batches))  # a pass that was broken off counts
    assert same(first[2], [torch.cat(t) for t in zip(*batches)])


def test_passes_may_overlap():
    batches = Batches(some_images(), 16, shuffle=True, augment=pad_crop_flip, **HALF)
    one, two = iter(batches), iter(batches)
    mixed = [(next(one), next(two)) for _ in range(len(batches))]
    first = epochs(2)
    for k in range(2):
        assert same(first[k], [torch.cat(t) for t in zip(*(pair[k] for pair in mixed))])


def test_orders_differ_between_neighbouring_seeds():
    drawn = {tuple(torch.randperm(50, generator=data._epoch_generator(s, e, "cpu")).tolist())
             for s in range(20) for e in range(50)}
    assert len(drawn) == 1000


def test_types_and_memory_order():
    x, y = next(iter(Batches(some_images(), 8, dtype=torch.bfloat16, channels_last=True,
                             shuffle=True, augment=pad_crop_flip, **HALF)))
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64


def test_the_set_is_not_changed():
    images = some_images()
    before = images.x.clone()
    epochs(images=images)
    epochs(images=images, shuffle=False, augment=None)
    assert torch.equal(images.x, before)


@pytest.mark.parametrize("settings, match", [
    ({"batch_size": 0}, "batch_size=0 must be"), ({"batch_size": 2.0}, "batch_size=2.0"),
    ({"batch_size": 51, "drop_last": True}, "some has 50 images, not one batch of 51"),
    ({"images": some_images().take(0)}, "some has 0 images"),
    ({"mean": (0.5,)}, "3 channels, but mean has 1"), ({"std": (0.5, 0.5, 0)}, "std must be positive"),
])
def test_batches_refuse(settings, match):
    with pytest.raises(ValueError, match=match):
        epochs(**settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    images = some_images(200, 3, 32).to("cuda")
    batches = Batches(images, 64, shuffle=True, augment=pad_crop_flip, channels_last=True, **HALF)
    list(batches)  # first use of each kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        for mode in "symmetric", "reflect", "zeros":
            batches.augment = lambda x, g, mode=mode: pad_crop_flip(x, g, mode=mode)
            assert len(list(batches)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_crops_like_the_cpu():
    x = some_images(81, 3, 32).x
    top, left = torch.cartesian_prod(torch.arange(9), torch.arange(9)).unbind(1)
    for mode in "symmetric", "reflect", "zeros":
        args = [x, top, left, top % 2 == 0]
        there = data._crop(*(a.cuda() for a in args), 4, mode)
        assert torch.equal(there.cpu(), data._crop(*args, 4, mode))
