"""Compile a C file once for this processor, and keep the result among the user's cached files."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

T = TypeVar("T")

FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
    # what lets loops become vector instructions; divisions stay divisions
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros",
)  # fmt: skip
WIDE = ("-mprefer-vector-width=512",)
"""Compilers take half of an x86 processor's vectors by themselves; where there are no wider ones, this changes nothing."""


class CompilerError(Exception):
    """There is no compiler here that makes of the file what is wanted; the message says why."""


def compiled(source: Path) -> Path:
    """A shared library of a C file, made if this compiler never made it, with the headers beside it, for this processor.

    The compiler is that of the environment variable CC, else `cc`.
    Raises: CompilerError.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    flags = [*FLAGS, *(WIDE if platform.machine().lower() in {"x86_64", "amd64"} else ())]
    # all that the compiler defines by itself: its version, and every instruction set of the processor
    target = _output([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
    files = [source, *sorted(source.parent.glob("*.h"))]
    key = sha256(b"\0".join([target, *map(str.encode, flags), *(file.read_bytes() for file in files)])).hexdigest()[:16]
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"{source.stem}-{key}.so"
        if not library.exists():
            with TemporaryDirectory(dir=folder) as own:
                made = Path(own) / library.name
                _output([*compiler, *flags, str(source), "-o", str(made), "-lm"])
                made.replace(library)
    except OSError as error:
        raise CompilerError(f"what was compiled cannot be kept: {error}") from error
    return library


def trusted(source: Path, read: Callable[[Path], T], is_right: Callable[[T], bool]) -> T:
    """What is compiled of a C file, after it was tried.

    Args: read: opens a shared library; is_right: whether what it opened computes what PyTorch does.
    Raises: CompilerError where nothing can be compiled, or what was compiled cannot be loaded or is not right.
    """
    try:
        library = read(compiled(source))
    except OSError as error:
        raise CompilerError(f"what was compiled cannot be loaded: {error}") from error
    if not is_right(library):
        raise CompilerError("what the C compiler made gives other numbers than PyTorch")
    return library


def absent(library: Callable[[], object]) -> str | None:
    """Why there is no compiled library here; None if there is. Args: library: opens it, or raises CompilerError."""
    try:
        library()
    except CompilerError as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcaq"


def _output(command: Sequence[str]) -> bytes:
    """What a command prints. Raises: CompilerError if it cannot be run, or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
    except FileNotFoundError as error:
        raise CompilerError(f"no C compiler was found ({command[0]}; the variable CC names another)") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {error.returncode}"]
        raise CompilerError(f"the C compiler {command[0]} failed: {lines[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"the C compiler {command[0]} failed: {error}") from error
