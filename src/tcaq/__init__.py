"""Post-training quantization of diffusion models, weights and activations, down to 4 bits.

Importing the package teaches diffusers to load its checkpoints.
"""

from tcaq.checkpoint import load, save
from tcaq.errors import TcaqError
from tcaq.export import export_onnx, export_openvino, load_onnx, load_openvino
from tcaq.integer.lower import Lowering, lower
from tcaq.models.config import TcaqConfig
from tcaq.models.quantizer import register
from tcaq.models.scheduler import NoiseAwareDDIMScheduler, NoiseAwareDDPMScheduler
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.quantize import quantize
from tcaq.spec.conditions import Conditions
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, Log2Grid, TokenGrid, UnitGrid
from tcaq.spec.plan import Plan, Rule
from tcaq.spec.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "AdaptiveGrid", "AffineGrid", "Conditions", "Log2Grid", "Lowering", "NoiseAwareDDIMScheduler",
    "NoiseAwareDDPMScheduler", "Plan", "Recipe", "Rule", "TcaqConfig", "TcaqError", "TokenGrid", "UnitGrid",
    "export_onnx", "export_openvino", "load", "load_onnx", "load_openvino", "lower", "preset_recipe", "quantize", "save",
]  # fmt: skip

register()
