"""`adapter_config.json` of someone else: rank and scale of each module, and what a row of B·A cannot express.

What would be silently lost is refused by name, with the way out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from allele.format import header
from allele.format.errors import ShapeMismatch

CONFIG = "adapter_config.json"

_MERGE = "merge it into a base of its own, or train it again without"
_REFUSED = {
    "use_dora": f"DoRA also scales the columns of W, which is no B·A: {_MERGE}",
    "modules_to_save": f"whole modules were trained, which are no B·A: {_MERGE}",
    "trainable_token_indices": f"embeddings were trained, which are no B·A: {_MERGE}",
    "bias": f"biases of the base were trained, which are no B·A: {_MERGE}",
    "lora_bias": f"B has a bias, which engines ignore: {_MERGE}",
    "fan_in_fan_out": "the matrices are transposed, as for the Conv1D layers of GPT-2: no such base is served here",
    "target_parameters": "experts are adapted as one parameter: train gate_proj, up_proj and down_proj of each expert",
    "layer_replication": "layers of the base are repeated: make that base, then train an adapter on it",
    "alora_invocation_tokens": f"the adapter is only active after some tokens, which engines ignore: {_MERGE}",
    "use_qalora": f"the input of A is pooled: {_MERGE}",
    "use_bdlora": f"the matrices are block diagonal: {_MERGE}",
    "arrow_config": f"several adapters are routed between: {_MERGE}",
    "kasa_config": f"the base is changed too: {_MERGE}",
    "monteclora_config": f"the adapter is sampled: {_MERGE}",
}
"""Key → why an adapter with it set is something else than B·A·x·scale, and what to do."""

_UNTOUCHED_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the base as it was; any other makes an adapter over W − s·B0·A0."""

_SMALLEST, _LARGEST = 1e-30, 1e30
_MAX_RANK = 1 << 16
_MODULE = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


_N = TypeVar("_N", int, float)


class Pattern(Generic[_N]):
    """`rank_pattern` or `alpha_pattern`: values for modules that a key names in full, or by the end after a dot."""

    def __init__(self, values: Mapping[str, _N]) -> None:
        places = enumerate(values.items())
        self._values: dict[str, tuple[int, _N]] = {key: (place, value) for place, (key, value) in places}

    def __bool__(self) -> bool:
        return bool(self._values)

    def get(self, module: str, default: _N) -> _N:
        """That of the first such key, which is PEFT's choice."""
        if not self._values:
            return default
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        return min((self._values[e] for e in ends if e in self._values), default=(0, default))[1]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Ranks and scales; `module` is e.g. `model.layers.0.self_attn.q_proj`."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Pattern[int]
    alphas: Pattern[float]

    @classmethod
    def parse(cls, text: bytes) -> LoraConfig:
        """Raises ShapeMismatch naming the key."""
        config = header.load_json(text, CONFIG, expected="an object with r and lora_alpha")
        _check_supported(config)
        return cls(
            rank=_rank("r", config.get("r")),
            alpha=_alpha("lora_alpha", config.get("lora_alpha")),
            rslora=bool(config.get("use_rslora")),
            ranks=Pattern({k: _rank(f"rank_pattern {k}", v) for k, v in _names(config, "rank_pattern").items()}),
            alphas=Pattern({k: _alpha(f"alpha_pattern {k}", v) for k, v in _names(config, "alpha_pattern").items()}),
        )

    @property
    def uniform(self) -> bool:
        """Whether no module has a rank or alpha of its own."""
        return not self.ranks and not self.alphas

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """Factor on B·A·x, as PEFT has it: rsLoRA and pattern together too."""
        rank = self.rank_of(module)
        return self.alphas.get(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _names(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Keys as plain names. PEFT takes regular expressions; one of a stranger can be made to match for hours."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ShapeMismatch(f"{CONFIG} {key}", expected="an object", found=f"{found!r:.100}")
    plain = {k.removeprefix("^").replace("\\.", "."): v for k, v in found.items()}
    for name in plain:
        if not _MODULE.fullmatch(name):
            hint = "write out the modules that it matches"
            raise ShapeMismatch(f"{CONFIG} {key}", expected="names of modules", found=f"{name!r:.100}", hint=hint)
    return plain


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise ShapeMismatch(f"{CONFIG} {key}", expected=f"1..{_MAX_RANK}", found=f"{value!r:.40}")
    return value


def _alpha(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not _SMALLEST < value < _LARGEST:
        raise ShapeMismatch(f"{CONFIG} {key}", expected="a number above 0", found=f"{value!r:.40}")
    return float(value)


def _check_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ShapeMismatch(f"{CONFIG} peft_type", expected="LORA", found=repr(kind))
    for key, reason in _REFUSED.items():
        if config.get(key) and config[key] != "none":
            raise ShapeMismatch(f"{CONFIG} {key}", expected="unset", found=repr(config[key]), hint=reason)
    init = config.get("init_lora_weights")
    if not any(init is known or init == known for known in _UNTOUCHED_BASE):
        raise ShapeMismatch(
            f"{CONFIG} init_lora_weights",
            expected="one that leaves the base untouched",
            found=repr(init),
            hint="the adapter belongs over the residual of its base: save it with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
