"""Prompts: a resumable cursor over reasoning-gym's tasks or a data set, and a held-out set that is never trained on."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random
from typing import Any

from scope_fast import distributed
from scope_fast.config import Config, Data, Verifier
from scope_fast.scope.trajectory import Prompt
from scope_fast.sources import read_rows
from scope_fast.tasks import GENERATED, GENERATORS, TASKS, check_name, dataset

TRAIN_SEEDS_APART = 1_000_000  # reasoning-gym draws entry i from seed + i: ranges of seeds must not overlap
ROLES = ("user", "assistant")
HELDOUT_SEED = 1 << 60  # beyond every run's and every warm start's
# of a generator's GENERATED entries: some take 32 bits alone, and no run's range of seeds reaches into this one
HELDOUT_SEED_32 = (1 << 32) - 1 - GENERATED


def encode_prompt(tokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt: through the tokenizer's chat template where it has one, else as plain text.

    prompt: the user's text, or chat messages. Raises ValueError for messages where there is no chat template.
    """
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ValueError(
                "prompt is a list of messages (of the rows, or made by data.examples), but the tokenizer has no chat "
                "template: give text prompts without data.examples, or a model.path whose tokenizer has one"
            )
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


class GymTasks:
    """Rows of reasoning-gym, the tasks in turn; endless, though those of a task that is not embedded come again after
    GENERATED. `heldout` rows come from seeds no run trains on. ValueError for an unknown task."""

    def __init__(self, tasks: list[str], seed: int) -> None:
        for name in tasks:
            check_name(name)
        self._tasks = list(tasks)
        self._seed = seed * TRAIN_SEEDS_APART

    def row(self, i: int) -> dict[str, Any]:
        """Row i of the run, whatever was asked for before."""
        return self._entry(i, self._seed)

    def heldout(self, count: int) -> list[dict[str, Any]]:
        """The same rows in every run."""
        return [self._entry(i, None) for i in range(count)]

    def _entry(self, i: int, seed: int | None) -> dict[str, Any]:
        """seed None: held out."""
        index, turn = divmod(i, len(self._tasks))
        name = self._tasks[turn]
        index = index if name in TASKS else index % GENERATED
        heldout_seed = HELDOUT_SEED if name in TASKS else HELDOUT_SEED_32
        entry = dataset(name, heldout_seed if seed is None else seed)[index]
        where = f"heldout-{index}" if seed is None else seed + index
        return {"id": f"{name}/{where}", "task": name, "prompt": entry["question"], "entry": entry}


class Table:
    """Rows of `data.path`, shuffled anew every epoch; the last `data.heldout` of them are set aside.

    A row's task and "metadata" are passed on to the verifier and the teacher. rows: all of them, in the file's order.
    Prints one line of counts. Raises ValueError for too few rows, and what `sources.read_rows` raises.
    """

    def __init__(self, data: Data, seed: int) -> None:
        rows, duplicates = read_rows(data)
        kept = len(rows) - data.heldout
        if kept <= 0:
            raise ValueError(
                f"data.path: {data.path} has {len(rows)} rows, data.heldout={data.heldout} leaves none to train on"
            )
        what = "dropped" if data.dedup else "kept (data.dedup drops them)"
        if distributed.is_main():
            print(
                f"data: {data.path}: {kept} rows and {data.heldout} held out; {duplicates} duplicates {what}",
                flush=True,
            )
        self.rows, self._kept, self._seed = rows, kept, seed
        self._epoch, self._order = -1, list[int]()
        self.tasks = sorted({row["task"] for row in rows})

    def row(self, i: int) -> dict[str, Any]:
        """Row i of the run, whatever was asked for before: i // rows is the epoch."""
        epoch, index = divmod(i, self._kept)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(self._kept))
            Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self.rows[self._order[index]]

    def heldout(self, count: int) -> list[dict[str, Any]]:
        """The last rows of the file, the same in every run."""
        return self.rows[self._kept :][:count]


def check_answers(rows: list[dict[str, Any]], score: str) -> None:
    """ValueError for an answer of several lines (GSM8K's is a whole solution), which no response's line equals, where
    `score` is the default verifier's."""
    if score != Verifier().score:
        return
    for row in rows:
        if row["task"] not in GENERATORS and "\n" in row["entry"]["answer"].strip():
            raise ValueError(
                f"data.path: the answer of {row['id']} has several lines, and verifier.score compares with the one "
                'behind "Answer:", so no response could be right: leave the final answer alone in the column, name '
                "another (data.answer_column), or use a verifier.score that reads it"
            )


class Encoder:
    """Rows into prompts of token ids, `data.examples` and `data.instruction` added.

    counts: rows passed over since they were last cleared, data/skipped_long (no room in the context, or over the limit)
    and data/skipped_short (no token, or under it).
    """

    def __init__(self, config: Config, tokenizer) -> None:
        data, longest = config.data, config.rollout.context - 1
        self._tokenizer, self._instruction, self._examples = tokenizer, data.instruction, data.examples
        self._least, self._most = data.min_prompt_tokens, min(data.max_prompt_tokens or longest, longest)
        self.counts: Counter[str] = Counter()

    def __call__(self, row: dict[str, Any]) -> Prompt | None:
        """None for a row that is passed over."""
        prompt = instructed(row["prompt"], self._instruction) if self._instruction else row["prompt"]
        if self._examples:
            prompt = shown(prompt, self._examples)
        ids = encode_prompt(self._tokenizer, prompt)
        if len(ids) < self._least:
            self.counts["data/skipped_short"] += 1
            return None
        if len(ids) > self._most:
            self.counts["data/skipped_long"] += 1
            return None
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
        messages = None if isinstance(prompt, str) else prompt
        return Prompt(row["id"], row["task"], text, tuple(ids), row["entry"], messages)


def usable(encode: Encoder, rows: list[dict[str, Any]], most: int | None = None) -> list[Prompt]:
    """The prompts of the rows that are not passed over, up to `most`; a row behind the last of them is not encoded, so
    that `encode` does not count it."""
    return list(islice((prompt for row in rows if (prompt := encode(row)) is not None), most))


def instructed(prompt: str | list[dict[str, str]], instruction: str) -> str | list[dict[str, str]]:
    """The prompt with a line added at its end; of chat messages, at the end of the last one."""
    if isinstance(prompt, str):
        return f"{prompt}\n{instruction}"
    *before, last = prompt
    return [*before, {**last, "content": f"{last['content']}\n{instruction}"}]


def shown(prompt: str | list[dict[str, str]], examples: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Chat messages: worked examples as earlier turns, behind a system message where there is one, then the prompt."""
    turns = [{"role": role, "content": text} for pair in examples for role, text in zip(ROLES, pair, strict=True)]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    lead = [message for message in messages[:1] if message["role"] == "system"]
    return [*lead, *turns, *messages[len(lead) :]]


class PromptSource:
    """Prompts in token ids. `cursor` is all its state: the same cursor gives the same prompts again.

    counts: what was passed over since `take_counts`: the Encoder's data/skipped_long and data/skipped_short, and
    data/skipped_heldout (the same text as a held-out prompt).
    Raises ValueError if no held-out prompt can be used; if an answer is one that the default verifier can find in no
    response; if the teacher or the reward model of the configuration works embedded tasks only and the rows are of
    others.
    """

    def __init__(self, config: Config, tokenizer) -> None:
        self._context = config.rollout.context
        if config.data.path is None:
            self._rows, tasks, where = GymTasks(config.data.tasks, config.seed), config.data.tasks, "data.tasks"
        else:
            self._rows, where = Table(config.data, config.seed), "data.path"
            tasks = self._rows.tasks
            check_answers(self._rows.rows, config.verifier.score)
        _check_workable(config, tasks, where)
        self._prompt = Encoder(config, tokenizer)
        self._counts = self._prompt.counts
        rows = self._rows.heldout(config.data.heldout)
        self.heldout = usable(self._prompt, rows)
        if not self.heldout:
            raise ValueError(f"data: none of {len(rows)} held-out prompts is usable ({self._reasons()})")
        self._heldout_texts = {prompt.text for prompt in self.heldout}
        self.heldout_counts = dict(self._counts)
        self.cursor = 0
        self.next(1)  # that there is one to train on shows here, not after the first evaluation
        self.cursor = 0
        self._counts.clear()  # what follows counts training prompts

    def next(self, count: int) -> list[Prompt]:
        """The next `count` usable prompts. ValueError if 1000 rows a prompt were not enough."""
        prompts: list[Prompt] = []
        tried = 0
        while len(prompts) < count:
            prompt = self._prompt(self._rows.row(self.cursor))
            self.cursor += 1
            tried += 1
            if prompt is not None and prompt.text in self._heldout_texts:
                self._counts["data/skipped_heldout"] += 1
            elif prompt is not None:
                prompts.append(prompt)
                continue
            if tried > 1000 * count:
                raise ValueError(f"data: {len(prompts)} usable prompts in {tried} rows ({self._reasons()})")
        return prompts

    def take_counts(self) -> dict[str, int]:
        """The counts since the last call, which starts them anew."""
        names = ("data/skipped_long", "data/skipped_short", "data/skipped_heldout")
        counts = {name: self._counts[name] for name in names}
        self._counts.clear()
        return counts

    def _reasons(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self._counts.items())
        return f"{counts}; rollout.context={self._context}"


def _check_workable(config: Config, tasks: list[str], where: str) -> None:
    """Refuses what could only fail row after row: the solver and the exact checker know the embedded tasks alone."""
    task = next((task for task in tasks if task not in TASKS), None)
    if task and config.repairs and config.teacher.kind == "solver":
        raise ValueError(
            f"teacher.kind: the solver cannot work task {task!r} of {where}; use teacher.kind: model or endpoint, or a "
            "method that asks no teacher (grpo, prm_reward)"
        )
    if task and config.scores_steps and config.prm.kind == "exact":
        raise ValueError(f"prm.kind: task {task!r} of {where} has no exact checker; use prm.kind: token_classifier")
