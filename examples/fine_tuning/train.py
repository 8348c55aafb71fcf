"""A fine-tuning job in a process of its own: `train.py BASE RESULT`."""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcached_demo.harness.model import TEXT

NUM_STEPS = 30
LEARNING_RATE = 1e-3


def main(base: Path, result: Path) -> None:
    """Train a model on one sentence and write it, with its tokenizer, to a folder."""
    torch.set_num_threads(1)  # it runs beside an engine
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(NUM_STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"the job: {NUM_STEPS} steps, loss {loss.item():.2f}", flush=True)
    shutil.copytree(base, result, dirs_exist_ok=True)  # the tokenizer as it is
    model.save_pretrained(result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
