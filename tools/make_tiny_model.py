"""Make a small, randomly initialised Qwen3 model: for tests in which the weights do not matter.

Usage: python -m tools.make_tiny_model SEED OUT [TOKENIZER_FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

TOKENIZER = Path(__file__).parents[1] / ".cache" / "models" / "SmolLM2-135M-Instruct"


def make_tiny_model(seed: int, tokenizer_folder: Path, out: Path) -> Path:
    """Write the model for `seed` into `out`, with the tokenizer of another folder; returns `out`.

    The same seed gives the same bytes; two seeds give two models of the same shape and name with
    different weights. Leaves torch's random state as it was.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # wide, so that greedy answers depend on the whole prompt
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.to(torch.float32).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


if __name__ == "__main__":
    if len(sys.argv) not in {3, 4}:
        sys.exit(__doc__)
    seed_, out_, *tokenizer_ = sys.argv[1:]
    make_tiny_model(int(seed_), Path(tokenizer_[0]) if tokenizer_ else TOKENIZER, Path(out_))
