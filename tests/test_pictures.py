"""Pictures on the way from a folder to a view: every layout, every fault, and the plain truth."""
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nbutils import pictures
from nbutils.pictures import (PictureError, Views, _draw, _sample, decode, decode_pictures,
                              find_pictures, load_folder)

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "bench"), str(ROOT / "tools")]

import decode as bench  # noqa: E402  (bench/decode.py)
import speed_page  # noqa: E402  (tools/speed_page.py)

GREY = 128


def picture(w=12, h=8, value=None, seed=0, mode="RGB"):
    """A picture of one value, or of noise."""
    shape = (h, w, 3)
    if value is not None:
        return Image.fromarray(np.full(shape, value, np.uint8)).convert(mode)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def names(pictures, root):
    return [(path.relative_to(root).as_posix(), label) for path, label in pictures]


@pytest.fixture
def table(tmp_path):
    """A folder with a good labels.csv, and a function that writes another."""
    for i, name in enumerate(("train/1", "train/2", "train/3", "test/1", "test/2")):
        save(tmp_path / f"{name}.png", picture(value=10 * i))
    (tmp_path / "class_names.txt").write_text("bus\ncar\n")
    rows = ["train,1,1", "train,2,2", "train,3,2", "test,1,1", "test,2,2"]

    def write(lines=rows, head="split,file,class"):
        (tmp_path / "labels.csv").write_text("\n".join([head, *lines]) + "\n")
        return tmp_path

    write.rows = rows
    return write


# --- layouts -------------------------------------------------------------------------------------
def test_folders_of_classes(tmp_path):
    for name in ("b/2.png", "a/1.JPG", "b/deep/3.webp", "b/notes.txt", ".git/x.png", "b/._2.png",
                 "b/.cache/2.png"):
        path = tmp_path / name
        save(path) if path.suffix != ".txt" else path.write_text("no picture")
    splits, classes = find_pictures(tmp_path)
    assert classes == ("a", "b") and list(splits) == ["all"]
    assert names(splits["all"], tmp_path) == [("a/1.JPG", 0), ("b/2.png", 1), ("b/deep/3.webp", 1)]


@pytest.mark.parametrize("test", ["valid", "val", "test"])
def test_folders_with_a_split(tmp_path, test):
    for split in ("train", test):
        for name in ("a", "b"):
            save(tmp_path / split / name / "1.png")
    splits, classes = find_pictures(tmp_path)
    assert set(splits) == {"train", "test"} and classes == ("a", "b")
    assert names(splits["test"], tmp_path) == [(f"{test}/a/1.png", 0), (f"{test}/b/1.png", 1)]


def test_two_test_sets_are_refused(tmp_path):
    for split in ("train", "valid", "test"):
        save(tmp_path / split / "a" / "1.png")
    with pytest.raises(ValueError, match="test, train, valid: leave train and one of the others"):
        find_pictures(tmp_path)


def test_a_train_without_a_test_set_is_no_class(tmp_path):
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / "train" / "b" / "1.png")
    with pytest.raises(ValueError, match="one class only, 'train'"):
        find_pictures(tmp_path)
    save(tmp_path / "plane" / "1.png")          # but among other classes it is one
    assert find_pictures(tmp_path)[1] == ("plane", "train")


def test_a_class_without_a_training_picture(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"):
        save(tmp_path / name)
    with pytest.raises(ValueError, match="no training picture of c"):
        find_pictures(tmp_path)


def test_folders_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder of a class with a picture"):
        find_pictures(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\.jpg, \.jpeg"):
        load_folder(tmp_path)


# --- labels.csv ----------------------------------------------------------------------------------
def test_a_table(table):
    root = table()
    splits, classes = find_pictures(root)
    assert classes == ("bus", "car")
    assert names(splits["train"], root) == [("train/1.png", 0), ("train/2.png", 1), ("train/3.png", 1)]
    assert names(splits["test"], root) == [("test/1.png", 0), ("test/2.png", 1)]


def test_a_table_with_endings_subfolders_names_and_a_mark(table):
    root = table()
    (root / "class_names.txt").unlink()
    save(root / "train/deep/1.JPG")
    rows = ["train,1.png,b", "train,2,a", "train,3,a", "train,deep/1,b", "test,1,a", "test,2.png,b"]
    table(rows, "\ufeffsplit,file,class")       # as spreadsheets write it
    splits, classes = find_pictures(root)
    assert classes == ("a", "b")
    assert ("train/deep/1.JPG", 1) in names(splits["train"], root) and len(splits["train"]) == 4


@pytest.mark.parametrize("head, rows, said", [
    ("split,name,class", None, r"needs the columns split, file, class.*'name'"),
    ("split,file,class", [], "it has no row"),
    ("split,file,class", {3: "test,1,0"}, r"line 5: unknown class '0'"),
    ("split,file,class", {3: "test,1,3"}, r"line 5: unknown class '3'"),
    ("split,file,class", {4: "test,2"}, r"line 6: unknown class None"),
    ("split,file,class", {0: "tran,1,1"}, r"line 2: unknown split 'tran'.*Did you mean train"),
    ("split,file,class", {3: "train,1,1", 4: "train,2,2"}, "has the splits train: it needs"),
    ("split,file,class", {3: "valid,1,1"}, "has the splits test, train, valid"),
])
def test_a_table_that_is_wrong(table, head, rows, said):
    lines = list(table.rows)
    if isinstance(rows, dict):
        for i, line in rows.items():
            lines[i] = line
    elif rows is not None:
        lines = rows
    with pytest.raises(ValueError, match=said):
        find_pictures(table(lines, head))


def test_missing_pictures_are_all_named(table):
    root = table([*table.rows, "train,9,1", "test,8.png,1"])
    with pytest.raises(PictureError, match="2 pictures are missing") as caught:
        find_pictures(root)
    assert caught.value.failed == {"train/9": "line 7 of labels.csv names it",
                                   "test/8.png": "line 8 of labels.csv names it"}


def test_a_picture_named_twice(table):
    with pytest.raises(PictureError, match="test/2.png: line 7 of labels.csv names it a second time"):
        find_pictures(table([*table.rows, "test,2.png,1"]))


def test_pictures_without_a_label_are_all_named(table):
    root = table()
    for i in range(12):
        save(root / "test" / f"more{i:02}.png")
    with pytest.raises(PictureError, match="12 pictures without a label") as caught:
        find_pictures(root)
    assert "test/more00.png" in str(caught.value) and "and 2 more" in str(caught.value)
    assert len(caught.value.failed) == 12


# --- decoding ------------------------------------------------------------------------------------
@pytest.mark.parametrize("w, h, kept", [
    (80, 60, "whole"), (200, 60, "middle"), (60, 60, "mirrored"), (60, 80, "mirrored"), (8, 6, "whole"),
    (1, 1, "mirrored"), (3, 90, "mirrored"), (90, 3, "middle")])
def test_shapes(w, h, kept):
    x = decode(stored(picture(w, h)), 30, ratio=4 / 3)
    assert x.shape == (3, 30, 40) and x.dtype == torch.uint8 and x.is_contiguous()
    if kept == "mirrored":
        assert torch.equal(x[..., 5:35], decode(stored(picture(w, h)), 30))
        assert torch.equal(x[..., :5], x[..., 5:10].flip(2))
        assert torch.equal(x[..., 35:], x[..., 30:35].flip(2))
    if kept == "middle":
        wide = decode(stored(picture(w, h)), 30, ratio=w / h)
        left = (wide.shape[2] - 40) // 2
        assert torch.equal(x, wide[..., left:left + 40])


def test_a_picture_of_the_right_size_is_not_touched():
    image = picture(40, 30)
    x = decode(stored(image), 30, ratio=4 / 3)
    assert torch.equal(x, torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))


def test_areas_are_averaged():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[::2] = 255                                        # stripes: a sampler would see one kind
    assert (decode(stored(Image.fromarray(pixels)), 20).float() - 127.5).abs().max() <= 1


@pytest.mark.parametrize("orientation, back", [(1, 0), (3, 180), (6, 90), (8, -90)])
def test_exif_turns_a_picture(orientation, back):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = picture(40, 30)
    file = stored(upright.rotate(back, expand=True), exif=exif)
    assert torch.equal(decode(file, 30, 4 / 3), decode(stored(upright), 30, 4 / 3))


def test_grey_palette_and_alpha():
    grey = decode(stored(picture(mode="L")), 8)
    assert grey.shape == (3, 8, 8) and torch.equal(grey[0], grey[2])
    flat = picture(value=GREY)
    for image in flat.quantize(4), flat.convert("RGBA"), flat.convert("LA"), flat.convert("CMYK"):
        kind = "JPEG" if image.mode == "CMYK" else "PNG"
        assert (decode(stored(image, kind), 8).int() - GREY).abs().max() <= 3, image.mode
    hidden = flat.convert("RGBA")
    hidden.putalpha(0)                                       # transparency is dropped
    assert (decode(stored(hidden), 8) == GREY).all()
    palette = picture().quantize(16)                         # and no warning, which would be an error
    assert torch.equal(decode(stored(palette, transparency=bytes(range(16))), 8), decode(stored(palette), 8))


def test_more_than_eight_bits_are_refused():
    deep = Image.fromarray(np.full((8, 8), 30_000, np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        decode(stored(deep), 8)


def test_bad_files_are_all_named_and_counted(tmp_path):
    files = [save(tmp_path / f"{i}.jpg", picture(40, 40, seed=i)) for i in range(5)]
    files[1].write_bytes(b"")
    files[3].write_bytes(files[3].read_bytes()[:-200])
    named = io.BytesIO(b"rubbish")
    named.name = "archive/9.jpg"
    with pytest.raises(PictureError, match="4 pictures cannot be decoded") as caught:
        decode_pictures([*files, named, io.BytesIO(b"rubbish")], 8, workers=2)
    assert list(caught.value.failed) == [str(files[1]), str(files[3]), "archive/9.jpg",
                                         "picture 6 of the list"]


def test_many_are_as_one_by_one_whatever_the_workers(tmp_path):
    files = [save(tmp_path / f"{i}.png", picture(20 + i, 15, seed=i)) for i in range(9)]
    expected = torch.stack([decode(f, 10, 1.5) for f in files])
    for workers in 1, 4, None:
        assert torch.equal(decode_pictures(files, 10, 1.5, workers), expected)
    assert decode_pictures([], 10, 1.5).shape == (0, 3, 10, 15)


@pytest.mark.parametrize("side, ratio", [(0, 1), (-1, 1), (2.5, 1), (8, 0.9), (8, float("nan"))])
def test_sizes_that_are_refused(side, ratio):
    with pytest.raises(ValueError, match="give a whole number"):
        decode_pictures([], side, ratio)


# --- a folder, decoded once ----------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch):
    """The number of pictures that were decoded so far, in a list of one."""
    count, real = [0], pictures.decode_pictures

    def counting(files, *args):
        count[0] += len(files)
        return real(files, *args)

    monkeypatch.setattr(pictures, "decode_pictures", counting)
    return count


def test_a_folder_is_decoded_once(table, counted):
    root = table()
    train, test = load_folder(root, side=8, ratio=1.5)
    assert (len(train), len(test)) == (3, 2) and train.x.shape[1:] == (3, 8, 12)
    assert train.classes == ("bus", "car") and train.y.tolist() == [0, 1, 1] and test.y.tolist() == [0, 1]
    assert [int(x[0, 0, 0]) for x in (*train.x, *test.x)] == [0, 10, 20, 30, 40]
    kept = root.parent / f"{root.name}-8x12.pt"
    assert kept.exists() and counted == [5]
    again, _ = load_folder(root, side=8, ratio=1.5)
    assert counted == [5] and torch.equal(again.x, train.x)


def test_a_changed_picture_is_decoded_anew(table, counted):
    root = table()
    path = root / "train/2.png"
    picture(value=10).save(path, "BMP")                                 # whose length stays
    load_folder(root, side=8)
    before = path.stat()
    picture(value=200).save(path, "BMP")
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))     # clocks may be coarse
    train, _ = load_folder(root, side=8)
    assert counted == [10] and train.x[1, 0, 0, 0] == 200


def test_a_copy_under_a_given_name_knows_its_size(table, tmp_path, counted):
    keep = tmp_path / "copy.pt"
    root = table()
    assert load_folder(root, side=8, keep=keep)[0].x.shape[2] == 8
    assert load_folder(root, side=6, keep=keep)[0].x.shape[2] == 6
    assert counted == [10]


def test_a_folder_called_dot(table, monkeypatch):
    root = table()
    monkeypatch.chdir(root)
    assert load_folder(".", side=8)[0].name == f"{root.name} train"
    assert (root.parent / f"{root.name}-8x8.pt").exists()


def test_a_share_is_drawn_where_there_is_no_split(tmp_path):
    root = tmp_path / "cars"
    for i in range(20):
        save(root / "ab"[i % 2] / f"{i}.png", picture(value=i))
    train, test = load_folder(root, side=4, share=0.25, seed=3)
    seen = [{int(x[0, 0, 0]) for x in images.x} for images in (train, test)]
    assert len(seen[0]) == 15 and len(seen[1]) == 5 and seen[0] | seen[1] == set(range(20))
    for images in train, test:
        assert [int(x[0, 0, 0]) % 2 for x in images.x] == images.y.tolist()
    same, other = (load_folder(root, side=4, share=0.25, seed=s)[1] for s in (3, 4))
    assert torch.equal(same.x, test.x) and not torch.equal(other.x, test.x)
    for share in 0, 1, -0.5:
        with pytest.raises(ValueError, match="share is"):
            load_folder(root, side=4, share=share)
    assert len(load_folder(root, side=4, share=0.999)[0]) == 1 == len(load_folder(root, side=4, share=0.001)[1])


# --- views ---------------------------------------------------------------------------------------
def noise(n=4, h=24, w=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, h, w), dtype=torch.uint8, generator=g)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("h, w", [(24, 24), (24, 40), (40, 24)])
def test_a_plain_view_is_the_middle(h, w):
    x = noise(h=h, w=w)
    top, left = (h - 24) // 2, (w - 24) // 2
    assert torch.equal(Views(24, train=False)(x), x[..., top:top + 24, left:left + 24])


def test_a_plain_view_draws_nothing():
    g = generator()
    Views(24, train=False)(noise(), g)
    assert torch.equal(g.get_state(), generator().get_state())


def test_the_same_seed_gives_the_same_views():
    x, views = noise(h=27, w=36), Views(24)
    assert torch.equal(views(x, generator(1)), views(x, generator(1)))
    assert not torch.equal(views(x, generator(1)), views(x, generator(2)))
    first = views(x, g := generator(1))
    assert not torch.equal(first, views(x, g)), "the next batch is drawn anew"


def test_a_view_is_bytes_and_leaves_the_pictures_alone():
    x = noise(h=25, w=33)
    before = x.clone()
    seen = Views(24)(x, generator())
    assert seen.shape == (4, 3, 24, 24) and seen.dtype == torch.uint8 and torch.equal(x, before)
    with pytest.raises(TypeError, match="uint8"):
        Views(24)(x.float())


def test_flip_alone_and_light_alone():
    x = noise(n=64)
    flipped = Views(24, zoom=1, degrees=0, light=0)(x, generator())
    (_, _, _, _, which), _ = _draw(Views(24, zoom=1, degrees=0, light=0), 64, "cpu", generator())
    assert 16 < which.sum() < 48
    assert torch.equal(flipped, torch.where(which.bool().view(-1, 1, 1, 1), x.flip(3), x))
    lit = Views(24, zoom=1, degrees=0, flip=False)
    _, (c, b) = _draw(lit, 64, "cpu", generator())
    mean = x.double().mean((1, 2, 3), keepdim=True)
    expected = (x - mean) * c.view(-1, 1, 1, 1) + mean + b.view(-1, 1, 1, 1)
    assert (lit(x, generator()) - expected.clamp(0, 255)).abs().max() < 0.501


def test_rotation_alone_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    x, angle, one = noise(n=1, h=31, w=31), np.radians(8.0), torch.ones(1)
    ours = _sample(x, 31, one * 31, one / 2, one / 2, one * angle, one * 0)[0]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([15.0, 15.0])
    for mine, plane in zip(ours, x[0].double().numpy()):
        theirs = ndimage.affine_transform(plane, turn, middle - turn @ middle, order=1, mode="reflect")
        assert np.abs(mine.numpy() - theirs).max() < 0.01


def test_zoom_alone_is_torchs_interpolation():
    x, one = noise(n=1, h=40, w=60), torch.ones(1)
    for short in 30, 40, 44:
        wide = round(60 * short / 40)
        large = torch.nn.functional.interpolate(x.float(), size=(short, wide), mode="bilinear")
        ours = _sample(x, 30, one * short, one * 0.999, one * 0, one * 0, one * 0)
        assert (ours - large[..., short - 30:, :30]).abs().max() < 0.01


def test_every_place_of_a_crop_is_used():
    x = torch.arange(30, dtype=torch.uint8).expand(2000, 1, 24, 30).contiguous()
    seen = Views(24, zoom=1, degrees=0, light=0, flip=False)(x, generator())[:, 0, 0, 0]
    counts = torch.bincount(seen.long(), minlength=7)
    assert len(counts) == 7 and (counts - 2000 / 7).abs().max() < 4 * (2000 / 7) ** 0.5


def test_the_draws_of_2018():
    n = 20_000
    (short, top, left, turn, flipped), (c, b) = _draw(Views(224), n, "cpu", generator())
    near = 4 * 0.5 / n ** 0.5
    assert set(short.tolist()) == set(range(224, 236))
    assert abs((short == 224).double().mean() - (0.25 + 0.75 / 11.2)) < near
    assert abs((turn == 0).double().mean() - 0.25) < near
    assert 9.9 < turn.rad2deg().max() <= 10.0001 and -10.0001 <= turn.rad2deg().min() < -9.9
    assert abs(flipped.mean() - 0.5) < near
    moved = turn != 0
    assert abs((short[moved] > 224).double().mean() - (0.75 - 0.75 / 11.2)) < near, "drawn by itself"
    assert 0.049 < b.abs().max() / 255 <= 0.05001 and abs(b.mean()) < 0.2
    assert abs(c.max() - 1.05) < 1e-3 and abs(c.min() - 1 / 1.05) < 1e-3
    assert 0 <= top.min() and top.max() < 1 and 0 <= left.min() and left.max() < 1


def test_without_p_nothing_is_zoomed_or_turned():
    (short, _, _, turn, _), _ = _draw(Views(24, p=0), 500, "cpu", generator())
    assert (short == 24).all() and (turn == 0).all()
    (short, _, _, turn, _), _ = _draw(Views(24, p=1, zoom=2), 500, "cpu", generator())
    assert short.max() > 40 and (turn != 0).all()


@pytest.mark.parametrize("settings", [{"size": 0}, {"size": 24.5}, {"size": 24, "zoom": 0.9},
                                      {"size": 24, "p": 1.1}, {"size": 24, "light": 1}])
def test_settings_that_are_refused(settings):
    with pytest.raises(ValueError, match="give a whole size"):
        Views(**settings)


# --- the benchmark and its records -----------------------------------------------------------------
def test_bench_runs(tmp_path, capsys, monkeypatch):
    for i in range(3):
        for split in "train", "test":
            save(tmp_path / "cars" / split / "ab"[i % 2] / f"{i}.png", picture(30, 30))
    monkeypatch.setattr(bench, "stand_ins", lambda n: [stored(picture(64, 48)).getvalue()] * n)
    assert bench.main(["--quick", "--folder", str(tmp_path / "cars"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "crops: n = 3" in said and "generated: n = 16" in said and said.count("goal: 16,185 pictures") == 2
    assert "no record" in said and not (tmp_path / "out").exists()
    assert bench.main(["--quick", "--folder", str(tmp_path / "nowhere")]) == 0
    assert "crops: not run: there is no folder nowhere" in capsys.readouterr().out


def test_bench_stand_ins_are_jpegs_of_their_size():
    raw, = bench.stand_ins(1)
    with Image.open(io.BytesIO(raw)) as image:
        assert image.format == "JPEG" and image.size == (640, 480)
    assert 90_000 < len(raw) < 150_000                       # a picture of Stanford Cars has 121 kB on average


def test_bench_would_notice_other_work(monkeypatch):
    calls = []

    def other(files, *args):
        calls.append(args)
        return torch.full((len(files), 3, 2, 2), len(calls), dtype=torch.uint8)

    monkeypatch.setattr(pictures, "decode_pictures", other)
    with pytest.raises(SystemExit, match="2 workers give another tensor: no record"):
        bench.measure("made", [b"x"], 2, 1.0, bench.arguments(["--quick"]))


@pytest.mark.parametrize("wrong", [["--workers", "a"], ["--workers", "0,1"], ["--workers", "2,2"], ["--n", "0"],
                                   ["--rounds", "0"]])
def test_bench_refuses(wrong, capsys):
    with pytest.raises(SystemExit):
        bench.arguments(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_bench_figures():
    case = {"n": 100, "contenders": [{"workers": 1, "seconds": [4.0, 2.0, 2.0], "cpu_seconds": [1.0, 2.0, 3.0]},
                                     {"workers": 2, "seconds": [1.0, 1.0, 4.0], "cpu_seconds": [1.0, 1.0, 1.0]}]}
    assert bench.rate(case, 1) == 50 and bench.rate(case, 2) == 100
    assert bench.minutes(case, 2) == pytest.approx(16_185 / 100 / 60)
    assert bench.speedup(case, 2) == (2, 0.5, 4) and bench.cpu_milliseconds(case, 1) == 20
    assert "2.70, met" in bench.verdict(case)
    case["contenders"][1]["seconds"] = [2.0] * 3
    assert "5.39, missed" in bench.verdict(case)


@pytest.mark.parametrize("path", sorted(bench.RECORDS.glob("*.json")), ids=lambda p: p.stem)
def test_bench_records_are_whole(path):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["format"] == 1 and record["name"] == path.stem and isinstance(record["load"]["anyway"], bool)
    assert [case["pictures"] for case in record["cases"]] == [bench.CROPS, bench.STAND_INS]
    for case in record["cases"]:
        if not case["not_run"]:
            assert case["n"] >= 100 and case["rounds"] >= 3 and len(case["contenders"]) >= 2
            for c in case["contenders"]:
                assert len(c["seconds"]) == len(c["cpu_seconds"]) == case["rounds"] and min(c["seconds"]) > 0
    assert not re.search(r"/(home|root|tmp|work)/", text)


def test_there_is_a_record_and_the_page_shows_it():
    records = bench.newest()
    assert records, "make bench-decode writes one"
    text = "\n\n".join(speed_page.decode_section(records))
    for case in records[0]["cases"]:
        assert case["not_run"] or f"| {bench.rate(case, 2):.0f} |" in text
    assert "*not run*" in "\n".join(speed_page.decode_section([]))
    if records[0]["load"]["anyway"]:
        assert "not quiet" in text


@pytest.mark.parametrize("side, ratio", [(0, 1.0), (3.5, 1.0), ("9", 1.0), (9, 0.5), (9, float("nan")), (9, float("inf"))])
def test_one_picture_of_an_impossible_size_is_refused(side, ratio, tmp_path):
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    for call in (lambda: decode(tmp_path / "a.png", side, ratio), lambda: decode_pictures([], side, ratio)):
        with pytest.raises(ValueError, match="give a whole number from 1 on, and a ratio of 1 or more"):
            call()


@pytest.mark.parametrize("degrees", [-1.0, 181.0, float("nan")])
def test_impossible_rotations_are_refused(degrees):
    with pytest.raises(ValueError, match=r"degrees .*: give .* degrees in \[0, 180\]"):
        Views(8, degrees=degrees)


def test_views_name_the_shape_that_they_got():
    with pytest.raises(TypeError, match=r"uint8 pictures \[b, c, h, w\], not torch.uint8 \[3, 9, 9\]"):
        Views(8)(torch.zeros(3, 9, 9, dtype=torch.uint8))
