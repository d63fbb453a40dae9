"""Shared by the tests of the method: tokenizers made from nothing, and trajectories from a few numbers."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scope_fast.config import Config, WarmStart
from scope_fast.config_files import load
from scope_fast.scope.trajectory import Prompt, Repair, Trajectory

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's word for it


@cache
def byte_level():
    """The embedded models' own tokenizer: a byte-level BPE, EOS 0, PAD 1."""
    from scope_fast.warm_start import build_tokenizer

    return build_tokenizer(Config(warm_start=WarmStart(vocab_size=300)))


@cache
def sentencepiece(prepend="first"):
    """Like Llama 2's: BPE over words that start with a visible space, bytes for all else. EOS 1."""
    merges = [("a", "b"), (SPACE, "ab"), ("=", "="), ("1", "2")]
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE]
    words += [*"abcd0123456789+=", *("".join(pair) for pair in merges)]
    vocab = {word: token for token, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    strip = [] if prepend == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def configured(**overrides):
    """The default configuration with dotted keys changed: configured(method="grpo", **{"loss.nll_coef": 1})."""
    return load(None, [(key, str(value)) for key, value in overrides.items()])


def prompt(entry=None, task="chain_sum", ids=(5, 6, 7), text="question"):
    return Prompt(f"{task}/0", task, text, tuple(ids), entry or {"answer": "1", "metadata": {"source_dataset": task}})


def trajectory(lengths=(2, 2), probs=None, first_error=None, reward=0.0, eos=True, sample=0, **changes):
    """A rollout whose steps have these token counts; its tokens are 100, 101, ... and its logprobs -1, -2, ...

    eos: a trailing token that belongs to no step. A rollout without a reward has no verdict.
    """
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    count = (ends[-1] if ends else 0) + eos
    made = Trajectory(
        changes.pop("prompt", prompt()), 0, sample, list(range(100, 100 + count)),
        [-float(i + 1) for i in range(count)], "stop" if eos else "length", 0,
    )  # fmt: skip
    made.steps = list(zip([0, *ends], ends, strict=False))
    made.reward, made.verdict = reward, "ok" if reward is not None else "timeout"
    made.step_probs, made.first_error = probs, first_error
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def accepted(kept_steps, kept_tokens, suffix_ids, reward=1.0):
    """A repair that passed verification."""
    return Repair(kept_steps, kept_tokens, "accepted", suffix_ids=list(suffix_ids), reward=reward)


def token_versions(rollout):
    """The version of the weights that drew each token of a Rollout."""
    spans = rollout.weight_versions or ((rollout.weight_version, 0, len(rollout.token_ids)),)
    return [version for version, start, end in spans for _ in range(start, end)]
