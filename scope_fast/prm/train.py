"""A process reward model of one's own: token classification, packed without padding.

    python -m scope_fast.prm.train BASE DATA OUT [--epochs 1 --lr 1e-5 ...]

BASE is a Hugging Face folder or hub name of a language model (the student, so that token ids can be passed on), DATA
rows as TRL's PRMTrainer reads them: "prompt" (text or chat messages), "completions" (the steps, a list of text) and
"labels" (a list of bool, one a step); JSONL, or with the extra "data" whatever `datasets` reads. A label stands at the
last token of its step, the separator behind it included, where `prm.kind: token_classifier` reads OUT; --step-separator
must be the run's scope.step_separator.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scope_fast import distributed
from scope_fast.batch import bins
from scope_fast.config import Data, unescaped
from scope_fast.data import encode_prompt
from scope_fast.loading import loading
from scope_fast.model_checks import check_packing
from scope_fast.prm.formats import Encoded
from scope_fast.sources import is_prompt, open_rows


class Example(NamedTuple):
    """encoded: prompt and steps, and the last token of each step. right: 0 or 1 for each."""

    encoded: Encoded
    right: list[int]


@dataclass(frozen=True)
class Settings:
    """Of the training; the defaults are our choice. heldout: a share. ValueError naming an option out of its range."""

    epochs: int = 1
    lr: float = 1e-5
    batch_sequences: int = 32
    token_budget: int = 4096
    heldout: float = 0.05
    seed: int = 0
    step_separator: str = "\n"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_sequences", "token_budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"--lr {self.lr}: expected more than 0, and a number")
        if not 0.0 <= self.heldout < 1.0:
            raise ValueError(f"--heldout {self.heldout}: expected a share, from 0 to less than 1")
        if not self.step_separator:
            raise ValueError("--step-separator is empty: expected the text between two steps")


def row_logits(model: nn.Module, sequences: Sequence[Encoded]) -> Tensor:
    """Logits (rows, 2) of a token classifier at the rows of all sequences, in order, from one packed pass."""
    device = next(model.parameters()).device
    ids, positions, where = [], [], []
    for sequence in sequences:
        where += [len(ids) + row for row in sequence.rows]
        ids += sequence.ids
        positions += range(len(sequence.ids))
    hidden = model.base_model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=None,
        use_cache=False,
    ).last_hidden_state[0]
    return model.score(hidden[torch.tensor(where, device=device)])


def read_examples(path: str, tokenizer, longest: int, separator: str = "\n") -> tuple[list[Example], int]:
    """The examples of a file, `separator` between their steps, and how many were passed over for being longer than
    `longest` tokens.

    Raises ValueError naming file and row for one whose columns are not those of TRL's PRMTrainer.
    """
    examples, too_long = [], 0
    for _, where, row in open_rows(Data(path=path))[1]:
        example = _example(row, where, tokenizer, separator)
        if len(example.encoded.ids) > longest:
            too_long += 1
        else:
            examples.append(example)
    return examples, too_long


def _example(row: Any, where: str, tokenizer, separator: str) -> Example:
    """What looks like a special token in a step is text, as in what is scored."""
    missing = [name for name in ("prompt", "completions", "labels") if not isinstance(row, dict) or not row.get(name)]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}: expected prompt, completions and labels")
    prompt, steps, labels = row["prompt"], row["completions"], row["labels"]
    if not is_prompt(prompt):
        raise ValueError(f"{where}: 'prompt' is {prompt!r}, expected text or a list of chat messages")
    if not isinstance(steps, list) or not all(isinstance(step, str) and step.strip() for step in steps):
        raise ValueError(f"{where}: 'completions' is {steps!r}, expected a list of text")
    if not isinstance(labels, list) or not all(isinstance(label, int) and label in (0, 1) for label in labels):
        raise ValueError(f"{where}: 'labels' is {labels!r}, expected a list of true and false")
    if len(steps) != len(labels):
        raise ValueError(f"{where}: {len(labels)} labels for {len(steps)} completions")
    ids = encode_prompt(tokenizer, prompt)
    rows = []
    for i, step in enumerate(steps):
        end = separator if i + 1 < len(steps) else ""
        ids += tokenizer.encode(step.strip() + end, add_special_tokens=False, split_special_tokens=True)
        rows.append(len(ids) - 1)
    return Example(Encoded(ids, rows), [int(label) for label in labels])


def fit(model: nn.Module, examples: list[Example], settings: Settings) -> Iterator[tuple[int, int, float]]:
    """AdamW on the mean cross entropy over the steps of a batch; yields (step, steps, loss) as it goes.

    FloatingPointError for a loss that is no number: nothing that follows could be one.
    """
    per_epoch = -(-len(examples) // settings.batch_sequences)
    steps, rng = per_epoch * settings.epochs, Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warmup, (steps - s) / steps))
    model.train()
    for step in range(steps):
        if step % per_epoch == 0:
            rng.shuffle(examples)
        start = step % per_epoch * settings.batch_sequences
        loss = _backward(model, examples[start : start + settings.batch_sequences], settings.token_budget)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step + 1}: the loss is {loss}; lower --lr")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield step + 1, steps, loss


def _backward(model: nn.Module, batch: list[Example], token_budget: int) -> float:
    """Gradients of the mean over the batch's steps, however it is split into passes."""
    count, total = sum(len(example.right) for example in batch), 0.0
    for group in bins([len(example.encoded.ids) for example in batch], token_budget):
        logits = row_logits(model, [batch[i].encoded for i in group])
        right = torch.tensor([label for i in group for label in batch[i].right], device=logits.device)
        loss = nn.functional.cross_entropy(logits.float(), right, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


@torch.inference_mode()
def accuracy(model: nn.Module, examples: list[Example], token_budget: int) -> tuple[float, float]:
    """(share of steps judged right, share of solutions whose first error, or its absence, is found)."""
    model.eval()
    steps = hits = found = 0
    for group in bins([len(example.encoded.ids) for example in examples], token_budget):
        judged = row_logits(model, [examples[i].encoded for i in group]).argmax(-1).tolist()
        for i in group:
            mine, judged = judged[: len(examples[i].right)], judged[len(examples[i].right) :]
            steps += len(mine)
            hits += sum(a == b for a, b in zip(mine, examples[i].right, strict=True))
            found += [*mine, 0].index(0) == [*examples[i].right, 0].index(0)
    return hits / steps, found / len(examples)


def train(base: str, data: str, out: Path, settings: Settings) -> None:
    """Trains from `base` into the folder `out`. ValueError for unusable data, where nothing is left to train on, or for
    an `out` that is no folder."""
    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if out.exists() and not out.is_dir():  # save_pretrained would only log that, after all the work
        raise ValueError(f"OUT: {out} is there, and no folder")
    disable_progress_bar()  # of its loading and saving: our lines are enough
    torch.manual_seed(settings.seed)
    device = distributed.device()
    with loading("BASE", base):
        tokenizer = AutoTokenizer.from_pretrained(base)
        longest = AutoConfig.from_pretrained(base).max_position_embeddings
    examples, too_long = read_examples(data, tokenizer, longest, settings.step_separator)
    Random(settings.seed).shuffle(examples)
    held = examples[: int(settings.heldout * len(examples))]
    rest = examples[len(held) :]
    if not rest:
        raise ValueError(f"{data}: no example to train on ({too_long} too long)")
    print(f"{data}: {len(rest)} to train on, {len(held)} held out, {too_long} too long", flush=True)
    with loading("BASE", base):
        model = AutoModelForTokenClassification.from_pretrained(base, num_labels=2, dtype=torch.float32).to(device)
    check_packing(model)
    for step, steps, loss in fit(model, rest, settings):
        if step == steps or step % 50 == 0:
            print(f"step {step}/{steps}: loss {loss:.4f}", flush=True)
    if held:
        by_step, by_solution = accuracy(model, held, settings.token_budget)
        print(f"held out: {100 * by_step:.1f} % of steps, first error {100 * by_solution:.1f} % of solutions")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"written: {out}; a run takes it by --prm.path {out}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m scope_fast.prm.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="Hugging Face folder or hub name of a language model, the student's")
    parser.add_argument("data", help="rows of prompt, completions (the steps) and labels (true or false, one a step)")
    parser.add_argument("out", type=Path, help="folder of the reward model")
    defaults = Settings()
    for name in Settings.__dataclass_fields__:
        value = getattr(defaults, name)
        kind, option = (unescaped if name == "step_separator" else type(value)), f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=value, help=f"default {value!r}")
    arguments = vars(parser.parse_args(argv))
    base, data, out = (arguments.pop(name) for name in ("base", "data", "out"))
    try:
        train(base, data, out, Settings(**arguments))
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
