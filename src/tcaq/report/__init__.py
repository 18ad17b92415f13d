"""One self-contained page that shows what a quantization did and what it cost, drawn from run files alone."""

from tcaq.report.grid import grid_image, side_by_side
from tcaq.report.page import Entry, Trial, write_report

__all__ = ["Entry", "Trial", "grid_image", "side_by_side", "write_report"]
