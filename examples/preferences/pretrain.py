"""Makes a base like `base/`: a Qwen3 of 104,832 parameters that answers in the right form, under all 64 preferences.

    OMP_NUM_THREADS=1 python examples/preferences/pretrain.py --out out/preferences-base

Two minutes on one core. The weights are not those of `base/` bit for bit, so the digest in the YAML files changes with
them. Every choice that training must make later has to be predictable somewhere here: the sign is written on both
sides, so that the closing one teaches the base to tell signs apart. With brackets, whose opener is never predictable,
training later stays at two thirds.
"""

from __future__ import annotations

import argparse
import math
import random
import time

import torch
import torch.nn.functional as F
from environment import CASES, LENGTH, LETTERS, ORDERS, SIGNS, draw_word, preference_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS = 0, 1
CHARACTERS = ["<pad>", "<eos>", "=", *LETTERS, *LETTERS.upper(), *SIGNS]
VOCABULARY = 48
PROMPT = LENGTH + 1
SEQUENCE = PROMPT + LENGTH + 3
PREFERENCES = [preference_of(i) for i in range(len(ORDERS) * len(SIGNS) * len(CASES))]


def model_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.05,
    )


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(c) for c in text]


def batch(rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels [size, SEQUENCE]; only the answer is learned."""
    inputs = torch.zeros(size, SEQUENCE, dtype=torch.long)
    labels = torch.full((size, SEQUENCE), -100)
    for row in range(size):
        word, preference = draw_word(rng, held=False), rng.choice(PREFERENCES)
        ids = [*encode(word + "=" + preference.answer(word)), EOS]
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, PROMPT - 1 : len(ids) - 1] = inputs[row, PROMPT : len(ids)]
    return inputs, labels


def train(model: Qwen3ForCausalLM, *, steps: int, size: int, rate: float) -> None:
    """AdamW with warm-up and cosine decay. The floor of the loss is ln 64 = 4.159 nats a sequence."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    rng, began = random.Random(1), time.monotonic()
    for step in range(steps):
        decayed = rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = max(decayed, rate * 0.01)
        inputs, labels = batch(rng, size)
        logits = model(inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: {loss.item():.3f} nats a sequence, {time.monotonic() - began:.0f} s", flush=True)


@torch.no_grad()
def valid_share(model: Qwen3ForCausalLM, *, words: int) -> float:
    """Share of sampled answers to held-out words that are right under some preference."""
    rng = random.Random(7)
    drawn = [draw_word(rng, held=True) for _ in range(words)]
    ids = torch.tensor([encode(w + "=") for w in drawn])
    for _ in range(LENGTH + 3):
        ids = torch.cat([ids, torch.multinomial(F.softmax(model(ids).logits[:, -1], -1), 1)], 1)
    valid = 0
    for word, answer in zip(drawn, ids[:, PROMPT:].tolist(), strict=True):
        valid += any(answer == [*encode(p.answer(word)), EOS] for p in PREFERENCES)
    return valid / words


def save_tokenizer(folder: str) -> None:
    """One token a character."""
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)}
    vocabulary |= {f"<unused{i}>": i for i in range(len(CHARACTERS), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=64
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps (default: 2200)")
    parser.add_argument("--batch", type=int, default=128, help="sequences in a step (default: 128)")
    parser.add_argument("--rate", type=float, default=6e-3, help="peak learning rate (default: 0.006)")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(model_config())
    train(model, steps=args.steps, size=args.batch, rate=args.rate)
    print(f"answers valid under some preference: {valid_share(model.eval(), words=1024):.3f}")
    model.save_pretrained(args.out)
    save_tokenizer(args.out)


if __name__ == "__main__":
    main()
