"""Which tensor of a stranger's file is which of the shape's: prefixes, adapter names, fused and split modules.

A module that is fused in the file is cut into the shape's own: B by rows, A shared by all of them or, where it has a
block of rows for each (SGLang's layout), cut likewise. A cut is a narrower entry over the same bytes; nothing is copied
here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from allele.format import header
from allele.format.cast import FLOATS
from allele.format.errors import ShapeMismatch
from allele.format.header import Entry, describe
from allele.format.lora_config import CONFIG, LoraConfig
from allele.format.shape import AdapterShape

_NAME = re.compile(
    r"(?:(?:base_model|model|module|_orig_mod)\.)*"
    r"(layers\.\d+\.(?:self_attn|mlp|mlp\.experts\.\d+))\.(\w+)"
    r"\.lora_([AB])(?:\.[^.]+)?\.weight",
    re.ASCII,
)
"""PEFT's names, with or without its prefixes, those of wrappers (DDP, torch.compile), and the adapter's name."""

_OURS = "base_model.model.model.%s.%s.lora_%s.weight"
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_MERGE = "merge it into a base of its own, or train the adapter again without it"
_KNOWN_EXTRAS = (
    ("lora_magnitude_vector", f"a magnitude of DoRA: {_MERGE}"),
    ("bias", f"a trained bias: {_MERGE}"),
    ("lora_embedding", f"an adapted embedding: {_MERGE}"),
    ("embed_tokens", f"an embedding that was trained or saved too: {_MERGE}, or save with save_embedding_layers=False"),
    ("lm_head", f"an output layer that was trained or saved too: {_MERGE}, or save with save_embedding_layers=False"),
    ("modules_to_save", f"a module that was trained as a whole: {_MERGE}"),
    (".experts.base_layer", "experts adapted as one parameter: train each expert's gate_proj, up_proj and down_proj"),
)


def module_of(name: str) -> str:
    """`model.layers.0.self_attn.q_proj` of the name of any of its matrices, as it is in the file."""
    parts = _NAME.fullmatch(name)
    assert parts is not None, "asked for tensors that were matched"
    return f"model.{parts[1]}.{parts[2]}"


def match(shape: AdapterShape, found: Mapping[str, Entry], config: LoraConfig, what: str) -> dict[str, Entry]:
    """The shape's names → where their numbers are, of the rank that `config` gives them.

    Raises ShapeMismatch for a tensor that is extra, missing, there twice, or of another shape or dtype.
    """
    expected = {e.name: e for e in shape.entries}
    plain = config.uniform and config.rank == shape.rank
    matched: dict[str, Entry] = {}
    for name, entry in found.items():
        known = expected.get(name) or expected.get(_canonical(name))
        if known is not None and plain and (entry.dtype, entry.shape) == (known.dtype, known.shape):
            pieces = [(known, entry)]
        else:
            pieces = _pieces(entry, expected, config)
        for target, piece in pieces:
            if target.name in matched:
                both = f"{matched[target.name].name} and {name}"
                raise ShapeMismatch(target.name, expected="one of them", found=both, hint="leave one adapter in it")
            matched[target.name] = piece
    absent = next((e for e in shape.entries if e.name not in matched), None)
    if absent is not None:
        raise header.missing(absent, what)
    return matched


def _canonical(name: str) -> str:
    """As the shape has it; empty for what is no LoRA matrix of a layer."""
    parts = _NAME.fullmatch(name)
    return _OURS % parts.groups() if parts else ""


def _pieces(entry: Entry, expected: Mapping[str, Entry], config: LoraConfig) -> list[tuple[Entry, Entry]]:
    """(tensor of the shape, its part of `entry`)."""
    parts = _NAME.fullmatch(entry.name)
    if parts is None:
        raise _extra(entry, "a LoRA matrix of a target module")
    parent, module, half = parts.groups()
    names = [_OURS % (parent, m, half) for m in _FUSED.get(module, (module,))]
    if not all(name in expected for name in names):
        raise _extra(entry, "no such tensor")
    targets = [expected[name] for name in names]
    rank = config.rank_of(f"model.{parent}.{module}")
    room = targets[0].shape["AB".index(half)]
    if rank > room:
        key = f"{CONFIG} r of {parent}.{module}"
        raise ShapeMismatch(key, expected=f"at most {room}, the rank of the shape", found=rank)
    if entry.dtype not in FLOATS:
        raise ShapeMismatch(entry.name, expected=" or ".join(FLOATS), found=describe(entry))
    return list(zip(targets, _cut(entry, targets, rank, half), strict=True))


def _cut(entry: Entry, targets: Sequence[Entry], rank: int, half: str) -> list[Entry]:
    """`entry` as one part for each target."""
    if half == "A":
        into, n = targets[0].shape[1], len(targets)
        if entry.shape == (rank, into):
            return [entry] * n
        if n > 1 and entry.shape == (n * rank, into):
            return [_rows(entry, i * rank, rank) for i in range(n)]
        wanted = f"[{rank}, {into}]" + (f" or [{n * rank}, {into}]" if n > 1 else "")
    else:
        heights = [t.shape[0] for t in targets]
        if entry.shape == (sum(heights), rank):
            return [_rows(entry, sum(heights[:i]), h) for i, h in enumerate(heights)]
        wanted = f"[{sum(heights)}, {rank}]"
    raise ShapeMismatch(entry.name, expected=f"{targets[0].dtype} {wanted}", found=describe(entry))


def _rows(entry: Entry, first: int, count: int) -> Entry:
    width = entry.shape[1]
    row = width * header.ITEM_BYTES[entry.dtype]
    start = entry.start + first * row
    return Entry(entry.name, entry.dtype, (count, width), start, start + count * row)


def _extra(entry: Entry, expected: str) -> ShapeMismatch:
    hint = next((h for part, h in _KNOWN_EXTRAS if part in entry.name), "other target modules or layers")
    return ShapeMismatch(entry.name, expected=expected, found=describe(entry), hint=hint)
