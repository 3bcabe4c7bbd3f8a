"""Images to train on: scikit-learn's digits held in memory, or a folder of photographs.

A folder is decoded once before training starts, on all cores (Pillow releases the lock while it
decodes, and a JPEG is decoded at an eighth of its size), so a corrupt file is named in the first
seconds and not in the middle of an epoch.
"""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from fastformer.train.data import DataError, Progress, visible_files

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images in memory: float32 (N, C, H, W) in [0, 1], labels int64 (N,), class names."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images on disk, labels int64 (N,), class names."""

    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Both sides of a folder, the files passed over (as "name: reason"), and a hash of the rest.

    The hash covers the paths below the folder and the bytes of the files, in order: where it is
    the same, so are the batches.
    """

    train: ImageFiles
    val: ImageFiles
    skipped: tuple[str, ...]
    sha256: str


def load_digits() -> ImageArrays:
    """Load the 1,797 handwritten digits that ship inside scikit-learn: (1797, 1, 8, 8)."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn: pip install 'fastformer[train]'"
        ) from error
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().div(16.0).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return ImageArrays(images, labels, tuple(str(name) for name in digits.target_names))


def split_arrays(arrays: ImageArrays) -> tuple[ImageArrays, ImageArrays]:
    """Split 80/20 within each class: every fifth image of a class is for validation.

    The split depends on nothing but the data, so results of different seeds can be compared.
    """
    of_class = torch.nn.functional.one_hot(arrays.labels, len(arrays.classes))
    place_in_class = of_class.cumsum(0).gather(1, arrays.labels[:, None]).squeeze(1)
    is_val = place_in_class % 5 == 0
    train, val = (
        ImageArrays(arrays.images[side], arrays.labels[side], arrays.classes)
        for side in (~is_val, is_val)
    )
    return train, val


def scan_folder(
    root: Path, on_progress: Progress | None = None, workers: int | None = None
) -> ImageFolder:
    """Read the layout `train/<class>/...` and `val/<class>/...` (or `test/`), decoding every file.

    Classes are sorted by name and must be the same on both sides. Files that cannot be decoded,
    or whose names do not end in one of `IMAGE_SUFFIXES`, are skipped and named; hidden ones are
    passed over. Raises DataError when a class is left without an image on either side.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("image files need Pillow: pip install 'fastformer[train]'") from error
    sides, classes = _layout(root)
    skipped: list[str] = []
    found: list[tuple[str, int, Path]] = []
    for side, folder in sides.items():
        for label, name in enumerate(classes):
            files, unreadable = visible_files(folder / name)
            skipped += unreadable
            for path in files:
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    found.append((side, label, path))
                else:
                    skipped.append(
                        f"{path.relative_to(root).as_posix()}: not {' '.join(IMAGE_SUFFIXES)}"
                    )

    kept: dict[str, list[tuple[int, Path]]] = {side: [] for side in sides}
    digest = hashlib.sha256()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        examined = pool.map(_examine, (path for _, _, path in found))
        for done, ((side, label, path), (contents, fault)) in enumerate(
            zip(found, examined, strict=True), start=1
        ):
            name = path.relative_to(root).as_posix()
            if fault is None:
                kept[side].append((label, path))
                digest.update(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
                digest.update(contents)
            else:
                skipped.append(f"{name}: {fault}")
            if on_progress:
                on_progress(done, len(found))

    for side, folder in sides.items():
        empty = set(range(len(classes))) - {label for label, _ in kept[side]}
        if empty:
            inside = folder / classes[min(empty)]
            prefix = inside.relative_to(root).as_posix() + "/"
            lost = [line for line in skipped if line.startswith(prefix)]
            reasons = f"; skipped {len(lost)}, first {lost[0]}" if lost else ""
            raise DataError(
                f"images: every class needs images ({' '.join(IMAGE_SUFFIXES)}), got none in "
                f"{inside}{reasons}"
            )
    train, val = (
        ImageFiles(
            tuple(path for _, path in kept[side]),
            torch.tensor([label for label, _ in kept[side]]),
            classes,
        )
        for side in sides
    )
    return ImageFolder(train, val, tuple(skipped), digest.hexdigest())


def _layout(root: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    if not root.is_dir():
        raise DataError(f"images: no such folder: {root}; check the path")
    sides = {
        "train": root / "train",
        "val": root / "val" if (root / "val").is_dir() else root / "test",
    }
    for folder in sides.values():
        if not folder.is_dir():
            raise DataError(
                f"images: the folder must hold train/<class>/ and val/<class>/ (or test/), "
                f"got {root} without {folder.name}/"
            )
    classes = _class_names(sides["train"])
    val_classes = _class_names(sides["val"])
    if classes != val_classes:
        raise DataError(
            f"images: train and {sides['val'].name} must have the same class folders, got only in "
            f"train: {_listed(set(classes) - set(val_classes))}; only in {sides['val'].name}: "
            f"{_listed(set(val_classes) - set(classes))}; in {root}"
        )
    if len(classes) < 2:
        raise DataError(
            f"images: at least 2 class folders are needed, got {len(classes)} in {sides['train']}; "
            "put the images of each class into a folder of its own"
        )
    return sides, classes


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(
        sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _examine(path: Path) -> tuple[bytes, str | None]:
    """Return the hash of a file, and why it cannot be decoded, or None."""
    try:
        data = path.read_bytes()
        with open_image(io.BytesIO(data)) as image:
            decode_rgb(image, enough=(1, 1))
    except Exception as error:  # damaged files make Pillow raise nearly any type
        return b"", decoding_reason(error)
    return hashlib.sha256(data).digest(), None


def decoding_reason(error: Exception) -> str:
    """Say why an image could not be decoded, in a few words without its path."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or damaged at its start"
    return f"{type(error).__name__}: {error}"


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Read the header of an image file; the pixels are decoded later, by `decode_rgb`."""
    from PIL import Image

    return Image.open(file)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once the camera's EXIF orientation is applied."""
    width, height = image.size
    return (height, width) if _is_sideways(image) else (width, height)


def decode_rgb(image: Image.Image, enough: tuple[int, int]) -> Image.Image:
    """Decode to upright RGB: EXIF orientation applied, transparency laid on white.

    A JPEG of at least twice the width and height of `enough` is decoded at 1/2, 1/4 or 1/8 of
    its size, never below `enough`; that skips most of the work on photographs from a camera.
    """
    from PIL import Image

    turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    image.draft(None, enough[::-1] if _is_sideways(image) else enough)
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255 where it should scale: all white.
        image = image.convert("F").point(lambda level: level * (1 / 257) + 0.5).convert("L")
        image.info.pop("transparency", None)  # a level of 16 bits, meaningless now
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _is_sideways(image: Image.Image) -> bool:
    return image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
