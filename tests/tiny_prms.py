"""Tiny random reward models of the published architectures, saved as they are published: true tensor names and
separators; the templates are the published ones' for plain turns, default system turn included."""

import json
import random

import torch
from factories import prompt, sentencepiece, trajectory
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2Model

from scope_fast.config import Config, WarmStart
from scope_fast.scope.steps import TokenBytes, split_steps
from scope_fast.warm_start import build_tokenizer

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nReason step by step.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.12,
}  # fmt: skip


def byte_level(*special, template=None):
    tokenizer = build_tokenizer(Config(warm_start=WarmStart(vocab_size=300)))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def shepherd_tokenizer():
    """Metaspace like Mistral's, with the label tokens and the separator as whole words."""
    tokenizer = sentencepiece()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    for piece in ("-", "к", "и", "ки", f"{space}ки", f"{space}+", f"{space}-"):
        model["vocab"].setdefault(piece, len(model["vocab"]))
    model["merges"] += [["к", "и"], [space, "ки"], [space, "+"], [space, "-"]]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer.from_str(json.dumps(backend))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def qwen(folder, seed=0):
    """(body, head) of a Qwen2ForProcessRewardModel whose checkpoint is saved in `folder`, in two shards."""
    torch.manual_seed(seed)
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "<extra_0>", template=CHATML)
    config = Qwen2Config(vocab_size=len(tokenizer), num_labels=2, eos_token_id=0, bos_token_id=None, **SIZES)
    body = Qwen2Model(config).eval()
    head = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 2))
    with torch.no_grad():
        head[2].weight.mul_(6.0)
    shards = {
        "model-00001-of-00002.safetensors": {f"model.{k}": v.contiguous() for k, v in body.state_dict().items()},
        "model-00002-of-00002.safetensors": {f"score.{k}": v.contiguous() for k, v in head.state_dict().items()},
    }
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    settings = {**config.to_dict(), "architectures": ["Qwen2ForProcessRewardModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer.save_pretrained(folder)
    return body, head


def causal(folder, kind, seed=0):
    """The language model of a generative reward model, saved in `folder`."""
    torch.manual_seed(seed)
    if kind == "math-shepherd":
        tokenizer, config, model = shepherd_tokenizer(), MistralConfig, MistralForCausalLM
    else:
        special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        tokenizer, config, model = byte_level(*special, template=LLAMA3), LlamaConfig, LlamaForCausalLM
    made = model(config(vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=None, **SIZES)).eval()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return made, tokenizer


def solutions(student, count, seed=0):
    """Rollouts of random sums, one a line, of one to six steps."""
    rng, made, to_bytes = random.Random(seed), [], TokenBytes(student)
    for i in range(count):
        lines = [
            f"{rng.randrange(99)} + {rng.randrange(99)} = {rng.randrange(199)}" for _ in range(rng.randrange(1, 7))
        ]
        ids = [*student.encode("\n".join(lines), add_special_tokens=False), student.eos_token_id]
        steps = split_steps(to_bytes(ids), trailing_eos=True)
        assert len(steps) == len(lines)
        asked = prompt(text=f"What is {rng.randrange(99)} + {rng.randrange(99)}?")
        made.append(trajectory((1,) * (len(ids) - 1), prompt=asked, sample=i, token_ids=ids, steps=steps))
    return made
