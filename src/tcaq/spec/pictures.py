"""Pictures that pipelines start from, by file and content."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Self

from tcaq.errors import UsageError
from tcaq.spec.base import Spec

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Picture(Spec):
    """One file. The checksum of its bytes is a part of the recipe: with another picture it is another quantization."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """The picture that a file holds now. Raises: UsageError if it cannot be read."""
        return cls(path=str(path), sha256=_checksum(path))

    def check(self) -> Path:
        """The file. Raises: UsageError if it is not the one any more that was chosen."""
        path = Path(self.path)
        if _checksum(path) != self.sha256:
            raise UsageError(
                f"{path} is another picture than the one that was chosen; put that one back, or start anew"
            )
        return path


def pictures_in(folder: Path) -> tuple[Picture, ...]:
    """Every picture in a folder, by name. Raises: UsageError if there is none."""
    found = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES] if folder.is_dir() else []
    if not found:
        raise UsageError(f"{folder} is no folder with pictures ({', '.join(SUFFIXES)})")
    return tuple(Picture.of(path) for path in found)


def _checksum(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read the picture {path}: {error}") from error
