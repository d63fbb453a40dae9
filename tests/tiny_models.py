"""Tiny random Qwen2 models for the engine tests, and the truth about their log-probabilities."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB = 300
EOS = 2


def make(tied=False, layers=2, seed=0):
    """A float32 model whose next-token distributions are neither flat nor peaked (entropy about 4 of ln 300 = 5.7)."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,  # 4 heads of 32: vLLM's CPU attention takes no smaller head
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config).eval()


def perturb(model, seed):
    """Moves every parameter, the biases that start at zero and the norms that start at one included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def response_logits(model, rollout):
    """Logits (len(token_ids), V) float32 that a full forward over prompt and response gives for the response tokens."""
    ids = torch.tensor([rollout.prompt_ids + rollout.token_ids])
    return model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].float()


def response_logprobs(model, rollout, temperature=1.0):
    """Log-probabilities (len(token_ids),) of the response at a temperature, from a full forward."""
    logprobs = (response_logits(model, rollout) / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
