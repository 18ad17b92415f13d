"""Processes that end with the one that started them, however that ended: a killed one tells nobody."""

from __future__ import annotations

import os
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import cast


def end_with_parent() -> None:
    """From now on this process, one of multiprocessing's own, ends when its parent does, whatever it is at."""
    Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    cast(BaseProcess, parent_process()).join()
    os._exit(1)  # an exception would end this thread alone
