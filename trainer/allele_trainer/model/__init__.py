"""The frozen Megatron-core model: built from a Hugging Face folder, run on packed sequences."""

import warnings

# Megatron says at import, once per module, that Transformer Engine and Apex are absent. This trainer uses neither.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
