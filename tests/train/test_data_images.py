"""Image data: digits, folders with damage in them, transforms, and batches of (seed, step)."""

import io
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastformer.train.data import DataError, Purpose, random_stream
from fastformer.train.data.image_batches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ArraySource,
    ImageBatches,
    PhotoSource,
    ValidationBatches,
    array_statistics,
    central_view,
    random_crop,
    random_view,
)
from fastformer.train.data.images import (
    ImageArrays,
    ImageFiles,
    decode_rgb,
    load_digits,
    scan_folder,
    split_arrays,
    upright_size,
)


def smooth_image(width, height, seed=0):
    """A photograph-like RGB image: JPEG and resizing change it little."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(6 * x * (1 + seed) + c) * np.cos(5 * y + c * seed) for c in range(3)]
    return Image.fromarray(np.uint8(127.5 + 120 * np.stack(waves, axis=-1)))


def pixels(image):
    return np.asarray(image).astype(int)


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def write_folder(root, sides=("train", "val"), classes=("a", "b"), count=2):
    for side in sides:
        for label, name in enumerate(classes):
            (root / side / name).mkdir(parents=True)
            for number in range(count):
                data = jpeg(smooth_image(40 + number, 30, seed=label))
                (root / side / name / f"{number}.jpg").write_bytes(data)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# digits


def test_digits_are_those_of_sklearn():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = load_digits()
    expected = datasets.load_digits()
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.dtype == torch.float32
    assert np.array_equal(digits.images.flatten(1).numpy() * 16, expected.data)
    assert np.array_equal(digits.labels.numpy(), expected.target)
    assert digits.labels.dtype == torch.int64
    assert digits.classes == tuple("0123456789")


def test_digits_without_sklearn_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'fastformer\[train\]'"):
        load_digits()


def test_split_is_stratified_and_loses_nothing():
    arrays = load_digits()
    train, val = split_arrays(arrays)
    counts = torch.bincount(arrays.labels)
    assert torch.equal(torch.bincount(val.labels), counts // 5)
    together = torch.cat([train.images, val.images]).flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(
        map(tuple, arrays.images.flatten(1).tolist())
    )
    fives = arrays.images[arrays.labels == 5]
    assert torch.equal(val.images[val.labels == 5], fives[4::5])


def test_normalised_digits_have_mean_0_and_deviation_1():
    train, _ = split_arrays(load_digits())
    mean, std = array_statistics(train)
    assert mean[0] == pytest.approx(train.images.numpy().astype("float64").mean())
    source = ArraySource(train, mean, std)
    images = source.load(range(len(train.labels)), None, seed=0).double()
    assert abs(images.mean()) < 1e-6 and abs(images.std(correction=0) - 1) < 1e-6


def test_shift_moves_by_at_most_one_pixel_and_fills_with_zeros():
    arrays = ImageArrays(torch.rand(50, 2, 8, 8) + 1, torch.zeros(50, dtype=torch.long), ("a",))
    source = ArraySource(arrays, (0.0, 0.0), (1.0, 1.0), shift=True)
    shifted = source.load(range(50), [4] * 50, seed=9)
    seen = set()
    for image, moved in zip(arrays.images, shifted, strict=True):
        fits = []
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                expected = torch.roll(image, (dy, dx), dims=(1, 2))
                if dy:
                    expected[:, 0 if dy > 0 else -1] = 0
                if dx:
                    expected[:, :, 0 if dx > 0 else -1] = 0
                if torch.equal(expected, moved):
                    fits.append((dy, dx))
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 9
    assert torch.equal(source.load(range(50), None, seed=9), arrays.images)
    assert not torch.equal(source.load(range(50), [5] * 50, seed=9), shifted)


# folders


def test_scan_reads_both_sides_with_classes_by_name(tmp_path):
    write_folder(tmp_path, classes=("dog", "Cat", "bird"), count=3)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "dog" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "train" / "dog" / "deep").mkdir()
    smooth_image(8, 8).save(tmp_path / "train" / "dog" / "deep" / "9.PNG")
    progress = []
    folder = scan_folder(tmp_path, lambda done, total: progress.append((done, total)), workers=2)
    assert folder.train.classes == folder.val.classes == ("Cat", "bird", "dog")
    assert folder.skipped == ()
    for side, files in (("train", folder.train), ("val", folder.val)):
        assert [files.classes[label] for label in files.labels] == [
            path.relative_to(tmp_path / side).parts[0] for path in files.paths
        ]
        assert list(files.paths) == sorted(files.paths)
    assert len(folder.train.paths) == 10 and len(folder.val.paths) == 9
    assert folder.train.labels.dtype == torch.int64
    assert progress == [(i, 19) for i in range(1, 20)]


def test_hash_tells_names_contents_and_order_but_not_the_place(tmp_path):
    hashes = []
    for place in ("one", "two"):
        write_folder(tmp_path / place)
        hashes.append(scan_folder(tmp_path / place).sha256)
    assert hashes[0] == hashes[1]
    folder = tmp_path / "one" / "train" / "a"
    (folder / "broken.jpg").write_bytes(b"")
    assert scan_folder(tmp_path / "one").sha256 == hashes[0]  # skipped: the batches are the same
    (folder / "0.jpg").rename(folder / "00.jpg")
    hashes.append(scan_folder(tmp_path / "one").sha256)
    (folder / "00.jpg").write_bytes(jpeg(smooth_image(40, 30, seed=3)))
    hashes.append(scan_folder(tmp_path / "one").sha256)
    assert len(set(hashes)) == 3


def test_test_folder_takes_the_place_of_val(tmp_path):
    write_folder(tmp_path, sides=("train", "test"))
    assert scan_folder(tmp_path).val.paths[0].parent == tmp_path / "test" / "a"
    write_folder(tmp_path, sides=("val",))
    assert scan_folder(tmp_path).val.paths[0].parent == tmp_path / "val" / "a"


def test_damaged_files_are_named_and_skipped(tmp_path, monkeypatch):
    write_folder(tmp_path)
    folder = tmp_path / "train" / "b"
    whole = jpeg(smooth_image(300, 200))
    progressive = jpeg(smooth_image(300, 200), progressive=True)
    png = io.BytesIO()
    smooth_image(100, 100).save(png, "PNG")
    damaged = {
        "cut10.jpg": whole[: len(whole) // 10],
        "cut90.jpg": whole[: len(whole) * 9 // 10],
        "cut_progressive.jpg": progressive[: len(progressive) // 2],
        "cut.png": png.getvalue()[: len(png.getvalue()) // 2],
        "empty.jpg": b"",
        "text.jpg": b"<html>not found</html>",
        "huge.png": png.getvalue(),
        "notes.txt": b"hello",
        "anim.gif": b"GIF89a",
    }
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
    # 100 x 100 is past the limit now: Pillow calls twice the limit a decompression bomb.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    found = scan_folder(tmp_path)
    assert [path.name for path in found.train.paths] == ["0.jpg", "1.jpg"] * 2
    reasons = dict(line.removeprefix("train/b/").split(": ", 1) for line in found.skipped)
    assert reasons.keys() == damaged.keys()
    assert "not an image" in reasons["empty.jpg"] and "not an image" in reasons["text.jpg"]
    assert "Bomb" in reasons["huge.png"]
    assert ".jpeg" in reasons["anim.gif"] and ".jpeg" in reasons["notes.txt"]


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_the_scan_accepts_what_full_decoding_accepts(tmp_path, progressive):
    data = jpeg(smooth_image(300, 200), progressive=progressive)
    path = tmp_path / "image.jpg"
    verdicts = set()
    for lost in (0, 1, 2, 3, 7, 50, 500, len(data) // 2, len(data) - 30):
        path.write_bytes(data[: len(data) - lost])
        verdict = []
        for enough in ((1, 1), (300, 200)):
            try:
                with Image.open(path) as image:
                    decode_rgb(image, enough)
                verdict.append(True)
            except OSError:
                verdict.append(False)
        assert verdict[0] == verdict[1]
        verdicts.add(verdict[0])
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "val").rename(root / "dev"),
            r"train/<class>/ .* without test/",
        ),
        (lambda root: (root / "train").rename(root / "dev"), "without train/"),
        (
            lambda root: (root / "val" / "b").rename(root / "val" / "c"),
            "only in train: b; only in val: c",
        ),
        (
            lambda root: [
                (root / side / "b").rename(root / side / ".b") for side in ["train", "val"]
            ],
            "at least 2 class folders are needed, got 1",
        ),
        (
            lambda root: [(root / "val" / "b" / f"{i}.jpg").unlink() for i in range(2)],
            "got none in .*val.b$",
        ),
        (
            lambda root: [(root / "val" / "b" / f"{i}.jpg").write_bytes(b"") for i in range(2)],
            "got none in .*val.b; skipped 2, first val.b.0.jpg: not an image",
        ),
    ],
    ids=[
        "no-val",
        "no-train",
        "other-classes",
        "one-class",
        "empty-class",
        "damaged-class",
    ],
)
def test_unusable_folder_is_one_clear_line(tmp_path, change, message):
    root = tmp_path / "data"
    write_folder(root)
    change(root)
    with pytest.raises(DataError, match=message) as caught:
        scan_folder(root)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such folder"):
        scan_folder(tmp_path / "missing")


# decoding


def decoded(image_or_data, name="image.png", enough=(10**6, 10**6), **options):
    if isinstance(image_or_data, bytes):
        buffer = io.BytesIO(image_or_data)
    else:
        buffer = io.BytesIO()
        image_or_data.save(buffer, Image.registered_extensions()[Path(name).suffix], **options)
    with Image.open(buffer) as image:
        return decode_rgb(image, enough)


def test_every_mode_becomes_rgb():
    colour = smooth_image(20, 10)
    grey = colour.convert("L")
    same = [
        (grey, grey.convert("RGB")),
        (colour, colour),
        (colour.convert("P"), colour.convert("P").convert("RGB")),
        (grey.convert("1"), grey.convert("1").convert("RGB")),
    ]
    for stored, expected in same:
        assert np.array_equal(pixels(decoded(stored)), pixels(expected)), stored.mode
    assert decoded(jpeg(colour.convert("CMYK"))).mode == "RGB"
    assert decoded(colour, "image.webp", lossless=True).mode == "RGB"
    assert np.array_equal(pixels(decoded(colour, "image.bmp")), pixels(colour))


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    image = decoded(Image.fromarray(levels))
    assert np.array_equal(pixels(image)[..., 1].ravel(), np.arange(256))
    marked = decoded(Image.fromarray(levels), transparency=40000)
    assert np.array_equal(pixels(marked)[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_laid_on_white(mode):
    options = {}
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([200, 0, 0, 0, 200, 0])
        image.putpixel((1, 0), 1)
        options["transparency"] = 0
        expected = [[255, 255, 255], [0, 200, 0]]
    elif mode == "RGB":
        image = Image.new("RGB", (2, 1), (200, 0, 0))
        image.putpixel((1, 0), (0, 200, 0))
        options["transparency"] = (200, 0, 0)
        expected = [[255, 255, 255], [0, 200, 0]]
    else:
        clear, half = ((9, 9, 9, 0), (100, 0, 0, 51)) if mode == "RGBA" else ((9, 0), (100, 51))
        image = Image.new(mode, (2, 1), clear)
        image.putpixel((1, 0), half)
        # 51 of 255 is a fifth: 100 / 5 + 255 * 4 / 5.
        expected = [[255] * 3, [224, 204, 204] if mode == "RGBA" else [224] * 3]
    assert pixels(decoded(image, **options))[0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = smooth_image(64, 32)
    # How the camera stores the upright picture, by the definition in the EXIF standard:
    # which side of the picture the first row and the first column of the file are.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(Image.fromarray(np.ascontiguousarray(stored)), exif=exif, subsampling=0)
    with Image.open(io.BytesIO(data)) as image:
        assert upright_size(image) == (64, 32)
        assert abs(pixels(decode_rgb(image, (64, 32))) - pixels(upright)).max() < 12
    half = decoded(data, enough=(32, 16))
    assert half.size == (32, 16)
    assert abs(pixels(half) - pixels(upright.resize((32, 16), Image.Resampling.BOX))).max() < 12
    assert decoded(data, enough=(33, 16)).size == (64, 32)


# transforms


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (60, 400), (1, 900)])
def test_central_view_is_resize_then_centre_crop(size):
    width, height = size
    image = smooth_image(width, height)
    if width <= height:
        wide, high = 64, int(64 * height / width)
    else:
        wide, high = int(64 * width / height), 64
    left, top = round((wide - 56) / 2.0), round((high - 56) / 2.0)
    expected = image.resize((wide, high), Image.Resampling.BILINEAR)
    expected = expected.crop((left, top, left + 56, top + 56))
    # Pillow rounds its filter weights once more when it is given a box.
    assert abs(pixels(central_view(image_file(image), 56)) - pixels(expected)).max() <= 1


def image_file(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(buffer)


def test_random_view_is_crop_resize_mirror():
    image = smooth_image(90, 70)
    mirrored = 0
    for epoch in range(20):
        stream = random_stream(Purpose.AUGMENTATION, 0, epoch)
        left, top, w, h = random_crop(90, 70, (0.08, 1.0), (3 / 4, 4 / 3), stream)
        expected = image.crop((left, top, left + w, top + h)).resize(
            (32, 32), Image.Resampling.BILINEAR
        )
        stream = random_stream(Purpose.AUGMENTATION, 0, epoch)
        view = pixels(random_view(image_file(image), 32, (0.08, 1.0), (3 / 4, 4 / 3), stream))
        plain = np.array_equal(view, pixels(expected))
        assert plain != np.array_equal(view[:, ::-1], pixels(expected))
        mirrored += not plain
    assert 4 <= mirrored <= 16


def test_random_crops_follow_torchvisions_distribution():
    W, H = 400, 300
    crops = []
    for number in range(3000):
        crops.append(random_crop(W, H, (0.08, 1.0), (3 / 4, 4 / 3), random_stream(1, number)))
    left, top, w, h = np.array(crops).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + w <= W).all() and (top + h <= H).all()
    # torchvision's sampling, written with NumPy's generator.
    rng = np.random.default_rng(0)
    reference = []
    while len(reference) < 20000:
        area = W * H * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        rw, rh = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rw <= W and rh <= H:
            reference.append((rng.integers(W - rw + 1), rng.integers(H - rh + 1), rw, rh))
    for ours, theirs in zip((left, top, w, h), np.array(reference).T, strict=True):
        grid = np.linspace(0, 400, 200)
        distance = np.abs(
            np.searchsorted(np.sort(ours), grid) / len(ours)
            - np.searchsorted(np.sort(theirs), grid) / len(theirs)
        ).max()
        # Kolmogorov-Smirnov at significance 0.0001.
        assert distance < 2.23 * math.sqrt(1 / len(ours) + 1 / len(theirs))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1000, 10), (493, 0, 13, 10)),
        ((10, 1000), (0, 493, 10, 13)),
        ((8, 8), (0, 0, 8, 8)),
    ],
)
def test_crop_that_never_fits_falls_back_to_the_centre(size, expected):
    scale = (0.9, 1.0) if max(size) > 8 else (2.0, 2.0)
    assert random_crop(*size, scale, (3 / 4, 4 / 3), random_stream(1)) == expected


def test_large_photograph_gives_the_same_view_decoded_at_a_fraction(tmp_path):
    image = smooth_image(1600, 1200)
    (tmp_path / "large.jpg").write_bytes(jpeg(image, subsampling=0))
    image.save(tmp_path / "large.png")
    files = ImageFiles(
        (tmp_path / "large.jpg", tmp_path / "large.png"),
        torch.tensor([0, 1]),
        ("a", "b"),
    )
    source = PhotoSource(files, 64, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    jpg, png = source.load([0, 1], None, seed=0)
    assert (jpg - png).abs().max() < 6
    with Image.open(tmp_path / "large.jpg") as opened:
        assert decode_rgb(opened, (170, 146)).size == (200, 150)


def test_photos_are_normalised(tmp_path):
    Image.new("RGB", (30, 20), (255, 0, 128)).save(tmp_path / "a.png")
    source = PhotoSource(ImageFiles((tmp_path / "a.png",), torch.tensor([0]), ("a",)), 16)
    for epochs in (None, [0]):
        image = source.load([0], epochs, seed=0)
        assert image.shape == (1, 3, 16, 16) and image.is_contiguous()
        for channel, level in enumerate((1.0, 0.0, 128 / 255)):
            expected = (level - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
            assert torch.allclose(image[0, channel], torch.tensor(expected), atol=1e-6)


def test_file_lost_after_the_scan_is_named(tmp_path):
    write_folder(tmp_path)
    files = scan_folder(tmp_path).train
    files.paths[1].unlink()
    with pytest.raises(DataError, match=r"1\.jpg could be decoded when training started"):
        PhotoSource(files, 16).load([0, 1], None, seed=0)


# batches


def labelled(count=23):
    """Image i is filled with i, its label is i % 3."""
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    arrays = ImageArrays(images, torch.arange(count) % 3, ("a", "b", "c"))
    return ArraySource(arrays, (0.0,), (1.0,))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    write_folder(root, count=5)
    return scan_folder(root)


def test_batches_chain_permutations_of_the_epochs():
    dataset = ImageBatches(labelled(), 7, seed=1)
    batches = [dataset[step] for step in range(23)]
    shown = torch.cat([batch["images"][:, 0, 0, 0] for batch in batches]).long()
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), shown % 3)
    assert all(batch["images"].shape == (7, 1, 4, 4) for batch in batches)
    epochs = shown.view(7, 23)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(23).expand(7, 23))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 7
    other = ImageBatches(labelled(), 7, seed=2)[0]["images"]
    assert not torch.equal(other, batches[0]["images"])


def test_batches_augment_by_seed_epoch_and_index():
    class Recorder:
        labels = torch.zeros(10, dtype=torch.long)

        def load(self, indices, epochs, seed):
            return torch.tensor(
                [[seed, epoch, i] for i, epoch in zip(indices, epochs, strict=True)]
            )

    dataset = ImageBatches(Recorder(), 4, seed=7)
    seen = torch.cat([dataset[step]["images"] for step in range(5)])
    assert seen[:, 0].unique().tolist() == [7]
    assert seen[:, 1].tolist() == [0] * 10 + [1] * 10
    assert sorted(seen[:10, 2].tolist()) == sorted(seen[10:, 2].tolist()) == list(range(10))


def test_batch_larger_than_an_epoch():
    shown = ImageBatches(labelled(5), 12, seed=1)[1]["images"][:, 0, 0, 0].long()
    assert sorted(shown[3:8].tolist()) == list(range(5))


def test_loader_workers_and_resumption_change_nothing(photos):
    torch.manual_seed(0)
    dataset = ImageBatches(PhotoSource(photos.train, 24), 4, seed=3)
    expected = [dataset[step] for step in range(8)]
    torch.manual_seed(1)
    for workers, first_step in [(0, 0), (1, 0), (2, 0), (2, 3), (0, 7)]:
        fresh = ImageBatches(PhotoSource(photos.train, 24), 4, seed=3)
        loader = DataLoader(
            fresh, sampler=range(first_step, 8), batch_size=None, num_workers=workers
        )
        loaded = list(loader)
        assert len(loaded) == 8 - first_step
        assert all(map(equal, loaded, expected[first_step:]))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_batch_of_one_rank(photos, world_size):
    source = PhotoSource(photos.train, 24)
    for step in (0, 4):
        whole = ImageBatches(source, 6, seed=3)[step]
        for rank in range(world_size):
            part = ImageBatches(source, 6 // world_size, 3, rank, world_size)[step]
            for name in whole:
                assert torch.equal(part[name], whole[name][rank::world_size])


def test_an_image_is_augmented_anew_in_each_epoch_and_seed(photos):
    source = PhotoSource(photos.train, 24)
    first = source.load([2, 2, 3], [0, 1, 0], seed=5)
    assert torch.equal(source.load([2], [1], seed=5)[0], first[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert not torch.equal(source.load([2], [0], seed=6)[0], first[0])


def test_validation_shows_every_image_once_in_order(photos):
    batches = ValidationBatches(labelled(), 5)
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 5, 5, 3]
    shown = torch.cat([batch["images"][:, 0, 0, 0] for batch in batches]).long()
    assert torch.equal(shown, torch.arange(23))
    batches = ValidationBatches(PhotoSource(photos.val, 24), 4)
    loader = DataLoader(batches, sampler=range(len(batches)), batch_size=None, num_workers=2)
    assert all(map(equal, loader, batches))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0] * 5 + [1] * 5


# photographs of the real world


@pytest.fixture(scope="module")
def cats_and_dogs():
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    root = Path(os.environ.get("FASTFORMER_TEST_DATA", beside)) / "cats_vs_dogs"
    if not root.is_dir():
        pytest.skip(f"no {root}: set FASTFORMER_TEST_DATA to a folder that holds cats_vs_dogs/")
    return root


def test_real_photographs(cats_and_dogs):
    folder = scan_folder(cats_and_dogs)
    assert folder.train.classes == ("cat", "dog") and folder.skipped == ()
    names = [path.name for path in folder.train.paths]
    assert [folder.train.classes[label] for label in folder.train.labels] == [
        name.split(".")[0] for name in names
    ]
    batch = ImageBatches(PhotoSource(folder.train, 224), 16, seed=0)[0]
    assert batch["images"].shape == (16, 3, 224, 224)
    # Normalised by ImageNet's statistics, photographs are near mean 0 and deviation 1.
    assert abs(batch["images"].mean()) < 0.6 and 0.7 < batch["images"].std() < 1.4


def test_real_photograph_truncated(cats_and_dogs, tmp_path):
    write_folder(tmp_path)
    real = sorted((cats_and_dogs / "train" / "cat").glob("*.jpg"))[:4]
    for number, path in enumerate(real):
        data = path.read_bytes()
        (tmp_path / "val" / "a" / path.name).write_bytes(data[: len(data) * (number + 5) // 10])
    skipped = scan_folder(tmp_path).skipped
    assert [Path(line.split(": ")[0]).name for line in skipped] == [path.name for path in real]
