"""What an adapter's bytes are: its tensor table, the packed file, the training state, and PEFT folders. No torch.

A packed adapter is an ordinary safetensors file with PEFT's names whose header is constant for the shape, so that
thousands of adapters are read, checked and copied as flat buffers and never tensor by tensor.
"""

from allele.format.errors import ShapeMismatch
from allele.format.importing import Imported, import_peft
from allele.format.peft import adapter_config, export_peft
from allele.format.shape import AdapterShape, Dtype, TensorSlot
from allele.format.state import State, StateShape

__all__ = [
    "AdapterShape",
    "Dtype",
    "Imported",
    "ShapeMismatch",
    "State",
    "StateShape",
    "TensorSlot",
    "adapter_config",
    "export_peft",
    "import_peft",
]
