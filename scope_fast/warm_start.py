"""The embedded default's models, made from nothing on two cores, shipped or cached by a hash of their settings.

    student   a tiny Qwen2, trained on worked solutions with slips in them: most steps right, many answers wrong
    teacher   the student, trained further on flawless solutions (made when `teacher: model` asks for it)
    prm       Qwen2ForTokenClassification on the student's body, trained on step labels of solutions with slips

All three share one byte-level BPE tokenizer, so any text round-trips exactly. Each is a Hugging Face folder. The
default's student and prm are shipped in scope_fast/assets, as made by `python -m scope_fast.warm_start`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scope_fast import config as cfg
from scope_fast.batch import LossOptions, Segment, TrainSequence, bins, pack
from scope_fast.config_files import load
from scope_fast.data import encode_prompt
from scope_fast.files import publish
from scope_fast.learner import hidden_rows
from scope_fast.losses import linear_scope_loss
from scope_fast.prm.formats import Encoded
from scope_fast.prm.train import row_logits
from scope_fast.progress import progress_bars
from scope_fast.tasks import STYLES, TASKS, Entry, Task, dataset, get_task, slipping

EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
VERSION = 1  # part of the models' key: raise it when this file changes what it makes
ASSETS = Path(__file__).parent / "assets"
CONTEXT = 1024  # most positions
TOKEN_BUDGET = 512  # of a micro-batch: attention on CPU pays for the square of it

Progress = Callable[[str, int, int], None]  # (what, done, total)


def ensure(config: cfg.Config, role: str, progress: Progress) -> Path:
    """The Hugging Face folder of `role` ("student", "teacher" or "prm"): shipped, cached, or made now."""
    folder = find(config, role)
    if not folder.is_dir():
        print(making(config, role), flush=True)
        make(config, role, folder, progress)
    return folder


def find(config: cfg.Config, role: str) -> Path:
    """Where the model of `role` is, or will be made: a model for each of the settings that go into it."""
    key = _key(config, role)
    if (ASSETS / role).is_dir() and (ASSETS / role / "key").read_text().strip() == key:
        return ASSETS / role
    return Path(config.cache).expanduser() / f"{role}-{key}"


def making(config: cfg.Config, role: str) -> str:
    """What it takes to make a model, in words."""
    steps = getattr(config.warm_start, f"{role}_steps")
    return (
        f"{role}: none is there yet for tasks {', '.join(_tasks(config))} and this warm_start; it is made first, by "
        f"{steps} optimiser steps, which may take minutes, and kept in {find(config, role)}"
    )


def make(config: cfg.Config, role: str, folder: Path, progress: Progress) -> None:
    """Trains the model of `role` into `folder`, which appears whole or not at all."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _BUILDERS[role](config, partial, progress)
        (partial / "key").write_text(f"{_key(config, role)}\n")
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_OF_THE_PRM = {"prm_steps", "prm_slip_rate", "prm_styles"}
_IRRELEVANT = {"student": {"teacher_steps", *_OF_THE_PRM}, "teacher": _OF_THE_PRM, "prm": {"teacher_steps"}}


def _key(config: cfg.Config, role: str) -> str:
    without = next((name for name in _tasks(config) if name not in TASKS), None)
    if without is not None:
        key = {"student": "model.path", "prm": "prm.path", "teacher": "teacher.path"}[role]
        setting = "data.tasks" if config.warm_start.tasks is None else "warm_start.tasks"
        raise ValueError(
            f"{key}: the tiny {role} is taught by worked solutions, which task {without!r} of {setting} does not have; "
            f"name a model, or use {', '.join(sorted(TASKS))}"
        )
    tasks = [(name, get_task(name).params) for name in _tasks(config)]
    settings = config.warm_start.model_dump(exclude={"tasks", *_IRRELEVANT[role]})
    for name in ("student_styles", "prm_styles"):
        if settings.get(name) == list(STYLES[:1]):
            del settings[name]  # younger than the models shipped under these keys, and without effect on them
    return cfg.digest(settings, role, tasks, VERSION)


def _tasks(config: cfg.Config) -> list[str]:
    return config.warm_start.tasks or config.data.tasks


class Example(NamedTuple):
    task: Task
    entry: Entry
    lines: list[str]
    style: str


def examples(config: cfg.Config, slip_rate: float, seed: int, styles: Sequence[str] = STYLES[:1]) -> Iterator[Example]:
    """Worked solutions without end, the tasks in turn, each in a style that is drawn."""
    rng, style_rng = Random(seed), Random(f"{seed}/style")
    tasks, index = [get_task(name) for name in _tasks(config)], 0
    while True:
        for task in tasks:
            entry, style = dataset(task.name, _seed(seed))[index], style_rng.choice(styles)
            yield Example(task, entry, task.solve(entry, slipping(rng, slip_rate), style), style)
        index += 1


def _seed(seed: int) -> int:
    return 500_000_000 + seed * 10_000_000  # entry i is drawn from seed + i; a run of seed s draws from s * 1e6 on


def build_tokenizer(config: cfg.Config):
    """A small vocabulary for Qwen2's own tokenizer class: byte-level BPE, digits one by one, lines kept apart.

    (Under another class AutoTokenizer would still load a Qwen2 folder as this one, and split text differently.)
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=config.warm_start.vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = _take(examples(config, 0.0, seed=config.warm_start.seed + 1), 2000)
    texts = ("\n".join([example.entry["question"], *example.lines]) for example in source)
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
    )


def _take(iterator: Iterator, count: int) -> Iterator:
    # draws one item more than it yields; the shipped models were made so, and islice would make others
    return (item for item, _ in zip(iterator, range(count), strict=False))


def _qwen2(config: cfg.Config, tokenizer):
    from transformers import Qwen2Config

    return Qwen2Config(
        **config.warm_start.architecture | {"vocab_size": len(tokenizer)},
        max_position_embeddings=CONTEXT,
        initializer_range=0.08,  # 0.02 suits widths in the thousands: at 128 training takes several times longer
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def _language_model(model, tokenizer, config: cfg.Config, steps: int, slip_rate: float, seed: int, what: str, progress):
    """Likelihood training with the loss of the RL loop: every response token is an NLL row."""
    source = examples(config, slip_rate, seed, config.warm_start.student_styles)

    def losses() -> Iterator[Tensor]:
        sequences = []
        for example in _take(source, config.warm_start.batch_sequences):
            text = "\n".join(example.lines)
            response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            sequences.append(likelihood(encode_prompt(tokenizer, example.entry["question"]), response))
        count = sum(len(sequence.response_ids) for sequence in sequences)
        for batch in pack(sequences, TOKEN_BUDGET, LossOptions(), 1, count):
            yield linear_scope_loss(hidden_rows(model, batch), model.get_output_embeddings().weight, batch.streams)[0]

    _fit(model, losses, steps, config.warm_start.lr, what, progress)


def _fit(
    model: nn.Module, losses: Callable[[], Iterable[Tensor]], steps: int, lr: float, what: str, progress: Progress
):
    """`steps` optimiser steps, each on the sum of `losses()`: Muon on the matrices of the body, AdamW on the rest.

    Muon reaches a likelihood in 300 steps here that AdamW alone reaches in 600.
    """
    body = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = [
        torch.optim.Muon(body, lr=7 * lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 20, (steps - s) / (0.6 * steps)))
        for o in optimizers
    ]
    for step in range(steps):
        for loss in losses():
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        progress(what, step + 1, steps)


def _save(model: nn.Module, tokenizer, folder: Path) -> None:
    """In bfloat16: half the bytes, and what every run starts from is exactly what is stored."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def likelihood(prompt: list[int], response: list[int], weight: float = 1.0) -> TrainSequence:
    """A sequence whose every response token is an NLL row."""
    n = len(response)
    return TrainSequence(prompt, response, [int(Segment.NLL)] * n, [0.0] * n, [weight] * n, [float("nan")] * n)


def _student(config: cfg.Config, folder: Path, progress: Progress) -> None:
    from transformers import GenerationConfig, Qwen2ForCausalLM

    warm = config.warm_start
    torch.manual_seed(warm.seed)
    tokenizer = build_tokenizer(config)
    model = Qwen2ForCausalLM(_qwen2(config, tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    what = "warm start: student"
    _language_model(model, tokenizer, config, warm.student_steps, warm.slip_rate, warm.seed, what, progress)
    _save(model, tokenizer, folder)


def _teacher(config: cfg.Config, folder: Path, progress: Progress) -> None:
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    student, warm = ensure(config, "student", progress), config.warm_start
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = Qwen2ForCausalLM.from_pretrained(student, dtype=torch.float32)
    what = "warm start: teacher"
    _language_model(model, tokenizer, config, warm.teacher_steps, 0.0, warm.seed + 2, what, progress)
    _save(model, tokenizer, folder)


def _prm(config: cfg.Config, folder: Path, progress: Progress) -> None:
    """Token classification on the student's body; labels from the task's own checker."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification

    student = ensure(config, "student", progress)
    tokenizer = AutoTokenizer.from_pretrained(student)
    warm = config.warm_start
    torch.manual_seed(warm.seed + 3)
    settings = Qwen2Config.from_pretrained(student, num_labels=2, classifier_dropout=0.0, dtype=torch.float32)
    model = Qwen2ForTokenClassification(settings).float()
    body = Qwen2ForCausalLM.from_pretrained(student, dtype=torch.float32).model
    model.model.load_state_dict(body.state_dict())
    source = examples(config, warm.prm_slip_rate, warm.seed + 4, warm.prm_styles)

    def losses() -> Iterator[Tensor]:
        labelled = [label_tokens(tokenizer, example) for example in _take(source, warm.batch_sequences)]
        steps = sum(sum(example.is_end) for example in labelled)
        others = sum(len(example.is_end) for example in labelled) - steps
        for group in bins([len(example.ids) for example in labelled], TOKEN_BUDGET):
            yield _classification_loss(model, [labelled[i] for i in group], steps, others)

    _fit(model, losses, warm.prm_steps, warm.lr, "warm start: reward model", progress)
    _save(model, tokenizer, folder)


class Labelled(NamedTuple):
    """ids: prompt and solution. where, right, is_end: of every labelled token its index, its label, and whether it
    ends a step."""

    ids: list[int]
    where: list[int]
    right: list[int]
    is_end: list[bool]


def label_tokens(tokenizer, source: Example) -> Labelled:
    """Labels of a solution up to its first wrong step: of a step's last token, whether the step is right; of its other
    tokens, whether it is right so far. The step's label alone is a sparse teacher for so small a model.
    """
    gold = source.task.solve(source.entry, style=source.style)
    example = Labelled(encode_prompt(tokenizer, source.entry["question"]), [], [], [])
    for i, line in enumerate(source.lines):
        end = "\n" if i + 1 < len(source.lines) else ""
        tokens, reference = (tokenizer.encode(text + end, add_special_tokens=False) for text in (line, gold[i]))
        same = next((k for k, pair in enumerate(zip(tokens, reference, strict=False)) if len({*pair}) > 1), len(tokens))
        right = line == gold[i]
        example.where.extend(range(len(example.ids), len(example.ids) + len(tokens)))
        example.right.extend([int(k < same) for k in range(len(tokens) - 1)] + [int(right)])
        example.is_end.extend([False] * (len(tokens) - 1) + [True])
        example.ids.extend(tokens)
        if not right:
            break
    return example


def _classification_loss(model: nn.Module, group: list[Labelled], num_ends: int, num_others: int) -> Tensor:
    """Cross entropy, the step ends and the other tokens each counting for half."""
    right = torch.tensor([label for example in group for label in example.right])
    is_end = torch.tensor([end for example in group for end in example.is_end])
    logits = row_logits(model, [Encoded(example.ids, example.where) for example in group])
    losses = nn.functional.cross_entropy(logits, right, reduction="none")
    return (losses * torch.where(is_end, 0.5 / num_ends, 0.5 / num_others)).sum()


_BUILDERS = {"student": _student, "teacher": _teacher, "prm": _prm}


def main(argv: list[str] | None = None) -> int:
    """Makes the quickstart's shipped models anew, in scope_fast/assets."""
    parser = argparse.ArgumentParser("python -m scope_fast.warm_start", description=main.__doc__)
    parser.add_argument("roles", nargs="*", default=["student", "prm"], choices=["student", "prm"])
    config = load()
    with progress_bars() as progress:
        for role in parser.parse_args(argv).roles:
            fresh = ASSETS / f".new-{role}"
            shutil.rmtree(fresh, ignore_errors=True)
            make(config, role, fresh, progress)
            shutil.rmtree(ASSETS / role, ignore_errors=True)
            fresh.rename(ASSETS / role)
    return 0


if __name__ == "__main__":
    sys.exit(main())
