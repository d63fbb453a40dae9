"""`python -m scope_fast.evaluate MODEL_OR_RUN`: how good, how sure, and how diverse a model's answers are.

MODEL_OR_RUN is a Hugging Face folder or hub name, "tiny" (the embedded student), or a run directory: then its export/
is evaluated under its own config.yaml, or with --step one of its checkpoints. What is asked:
    by default          the embedded tasks of the configuration, on held-out prompts (of more than data.heldout, or of
                        other tasks than the run's, a few in a thousand may be a training prompt's text again); of a
                        run with data.path, the rows it held out
    --data.path FILE    every row of a data set             --suite FILE    every row of a list of benchmarks
Configuration keys may follow, as for `scope_fast.train`: --rollout.max_tokens 2048 --verifier.score my.module:score
With --suite, data.* and verifier.score may not: the suite's file says them for every benchmark.
The result is a table and a JSON file: --json's, or for a run RUN/evaluation.json; the names of another data set or
suite and of the step are appended: evaluation_FILE_step_N.json.
scorecard.py says what is measured.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from scope_fast import checkpoint, diversity, environment, warm_start
from scope_fast.build import engine_options, load_student, load_tokenizer, role_folder
from scope_fast.config import Config
from scope_fast.data import Encoder, GymTasks, Table, check_answers, usable
from scope_fast.evaluate_request import Request, parse
from scope_fast.loading import loading
from scope_fast.prm.load import make_scorer
from scope_fast.prm.scorers import ExactScorer, StepScorer
from scope_fast.progress import progress_bars
from scope_fast.rollout import make_engine
from scope_fast.rollout.base import Rollout, RolloutEngine, Sampling
from scope_fast.scope.localize import first_error, valid_probs
from scope_fast.scope.steps import TokenBytes, split_steps
from scope_fast.scope.trajectory import Prompt, Trajectory
from scope_fast.scorecard import Result, average, score_benchmark, tables
from scope_fast.seeds import seed_of
from scope_fast.sources import read_rows
from scope_fast.tasks import TASKS
from scope_fast.verifier import Verifier

SIMILARITY = {
    "diversity/self_bleu": ("sacrebleu", diversity.self_bleu),
    "diversity/self_rouge": ("rouge_score", diversity.self_rouge),
}

console = Console(highlight=False)


@dataclass(frozen=True)
class Job:
    """One benchmark, ready to be asked. counts: rows passed over on the way to its prompts (data/skipped_*), and
    data/duplicates of the whole data set, which are dropped only where data.dedup says so."""

    name: str
    prompts: list[Prompt]
    samples: int
    score: str
    counts: dict[str, int]
    group: str | None = None


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    disable_progress_bar()  # of transformers' loading
    with ExitStack() as stack:
        try:
            request = parse(arguments, __doc__)
            request = replace(request, folder=model_folder(request, stack))
            if request.prm == "tiny":
                with progress_bars(console) as progress:
                    request = replace(request, prm=str(warm_start.ensure(request.config, "prm", progress)))
            evaluator = Evaluator(request, stack)
        except (ValueError, OSError, ImportError) as error:
            console.print(f"error: {error}", markup=False, soft_wrap=True)
            return 2
        results = [evaluator.run(job) for job in evaluator.jobs]
    groups = list(dict.fromkeys(r.group for r in results if r.group is not None))
    averages = [average(name, members) for name in groups if len(members := _members(results, name)) > 1]
    for table in tables([*results, *averages], console.width):
        console.print(table)
    for missing in sorted(package for package, _ in SIMILARITY.values() if find_spec(package) is None):
        line = f"{missing} is not installed, so its measure is left out: {diversity.INSTALL}"
        console.print(line, markup=False, soft_wrap=True)
    if request.json is not None:
        request.json.parent.mkdir(parents=True, exist_ok=True)
        request.json.write_text(json.dumps(record(evaluator, results, averages), indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {request.json}", markup=False, soft_wrap=True)
    return 0


def _members(results: list[Result], group: str) -> list[Result]:
    return [result for result in results if result.group == group]


def model_folder(request: Request, stack: ExitStack) -> str:
    """The model's folder or hub name. Embedded models are made; of a step's checkpoint, a folder until `stack` ends."""
    config = request.config
    if request.step is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": request.folder})})
    with progress_bars(console) as progress:
        folder = role_folder(config, "student", progress)
    if request.step is None:
        return folder
    made = Path(stack.enter_context(TemporaryDirectory(prefix="scope_fast_evaluate_")))
    return str(export_step(request, folder, made))


def export_step(request: Request, student: str, folder: Path) -> Path:
    """The Hugging Face folder of a checkpoint, written under `folder`. student: the model it is of."""
    model, tokenizer = load_student(request.config, student), load_tokenizer(student)
    state = checkpoint.load(request.run / "checkpoints" / f"step_{request.step}")
    model.load_state_dict(state["model"])
    return checkpoint.export(folder, model, tokenizer)


class Evaluator:
    """The parts of an evaluation; `run` asks one job. `stack` closes them. Everything that can be wrong with the input
    is found here, before anything is sampled."""

    def __init__(self, request: Request, stack: ExitStack) -> None:
        self.request, self.config = request, request.config
        with loading("MODEL_OR_RUN", request.folder):
            self.tokenizer = AutoTokenizer.from_pretrained(request.folder)
        self.jobs = suite_jobs(request, self.tokenizer) if request.suite else plain_jobs(request, self.tokenizer)
        if request.temperature == 0.0 and any(job.samples > 1 for job in self.jobs):
            raise ValueError("temperature 0 draws the same response every time: add --k 1 --samples 1")
        settings = self.config.verifier
        self.verifiers = {
            score: stack.enter_context(Verifier(score, settings.workers, settings.timeout_s))
            for score in sorted({job.score for job in self.jobs})
        }
        self.prm: StepScorer | None = None
        if request.prm is not None:
            self.prm = make_scorer(self.config, request.prm, self.tokenizer, stack)
        rollout = self.config.rollout
        most = max(len(job.prompts) * job.samples for job in self.jobs)  # a run's step may be smaller
        options = replace(engine_options(self.config), max_num_seqs=min(rollout.max_num_seqs, most))
        engine = make_engine(rollout.engine, request.folder, options)
        self.engine: RolloutEngine = stack.enter_context(closing(engine))
        if self.config.rollout.server_url is not None:  # it has the weights that somebody left it
            self.engine.update_weights(load_student(self.config, request.folder), version=0)

    def run(self, job: Job) -> Result:
        """The samples of a job, verified, localised and scored."""
        console.print(f"{job.name}: {len(job.prompts)} problems x {job.samples} samples", markup=False)
        groups = self.sample(job)
        members = [t for group in groups for t in group]
        verdicts = self.verifiers[job.score].score([(t.text, t.prompt.entry) for t in members])
        for trajectory, verdict in zip(members, verdicts, strict=True):
            trajectory.reward, trajectory.verdict, trajectory.answer = verdict.reward, verdict.status, verdict.answer
        counts = {**job.counts, **self.localize([t for t in members if t.failed])}
        ks = [k for k in self.request.ks if k <= job.samples]
        return score_benchmark(
            job.name, groups, ks, similarity=similarity(), counts=counts, group=job.group, seed=self.config.seed
        )

    def sample(self, job: Job) -> list[list[Trajectory]]:
        """Every response has a seed of what it answers, so that the same evaluation draws the same."""
        rollout = self.config.rollout
        end = self.tokenizer.eos_token_id  # as in training, whatever the model's own configuration says
        stop = () if end is None else (end,)
        sampling = Sampling(self.request.temperature, rollout.top_p, rollout.max_tokens, stop)
        seeds = [[seed_of(self.config.seed, job.name, p.id, i) for i in range(job.samples)] for p in job.prompts]
        outputs = self.engine.generate([list(p.ids) for p in job.prompts], job.samples, sampling, seeds)
        return [
            [self._trajectory(prompt, number, i, rollout) for i, rollout in enumerate(rollouts)]
            for number, (prompt, rollouts) in enumerate(zip(job.prompts, outputs, strict=True))
        ]

    def _trajectory(self, prompt: Prompt, group: int, sample: int, rollout: Rollout) -> Trajectory:
        text = self.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
        return Trajectory(
            prompt, group, sample, rollout.token_ids, rollout.logprobs, rollout.finish_reason,
            rollout.weight_version, text=text,
        )  # fmt: skip

    def localize(self, failed: list[Trajectory]) -> dict[str, int]:
        """First errors, by the model of --prm, else by the checker of an embedded task; how many have none, by why."""
        scorer = self.prm or ExactScorer(self.tokenizer)
        checked = [t for t in failed if self.prm is not None or t.prompt.task in TASKS]
        token_bytes = TokenBytes(self.tokenizer) if checked else None
        for t in checked:
            separator = self.config.scope.step_separator.encode()
            t.steps = split_steps(token_bytes(t.token_ids), separator, t.finish_reason == "stop")
        members = [t for t in checked if t.steps]
        invalid = 0
        for trajectory, probs in zip(members, scorer(members), strict=True):
            if valid_probs(probs, len(trajectory.steps)):
                trajectory.first_error = first_error(probs, self.config.prm.tau)
            else:
                invalid += 1
        unchecked, empty = len(failed) - len(checked), len(checked) - len(members)
        return {"scope/unchecked": unchecked, "scope/empty": empty, "prm/invalid": invalid}


def plain_jobs(request: Request, tokenizer) -> list[Job]:
    """The jobs without a suite: a whole data set, or the held-out prompts of the configuration, one for each task."""
    config, samples = request.config, request.samples or request.ks[-1]
    if not request.own_data and config.data.path is not None:  # null: the embedded tasks, whatever a run had
        return [dataset_job(request, tokenizer, config, Path(config.data.path).stem, config.verifier.score, samples)]
    count = request.prompts or config.evaluation.prompts
    if config.data.path is None:  # generators: as many as asked for
        rows, where = GymTasks(list(request.tasks) or config.data.tasks, config.seed).heldout(count), "data.tasks"
    else:
        table, where = Table(config.data, config.seed), config.data.path
        check_answers(table.rows, config.verifier.score)
        rows = table.heldout(config.data.heldout)
    prompts, counts = encoded(where, rows, config, tokenizer, count)
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    group = "all" if len(by_task) > 1 else None
    jobs = [Job(name, found, samples, config.verifier.score, {}, group) for name, found in by_task.items()]
    jobs[0].counts.update(counts)  # of all tasks together
    return jobs


def suite_jobs(request: Request, tokenizer) -> list[Job]:
    """The suite's benchmarks that --task names, or all."""
    jobs = []
    for name, benchmark in request.suite.benchmarks.items():
        if not request.tasks or name in request.tasks:
            config = request.config.model_copy(update={"data": benchmark.data})
            samples = request.samples or max(benchmark.samples or request.ks[-1], request.least_samples)
            job = dataset_job(request, tokenizer, config, name, benchmark.score, samples)
            jobs.append(replace(job, group=benchmark.group))
    return jobs


def dataset_job(request: Request, tokenizer, config: Config, name: str, score: str, samples: int) -> Job:
    """Every row of `config.data.path`, up to --prompts."""
    rows, duplicates = read_rows(config.data)
    check_answers(rows, score)
    prompts, counts = encoded(f"{name}: {config.data.path}", rows, config, tokenizer, request.prompts)
    return Job(name, prompts, samples, score, {"data/duplicates": duplicates, **counts})


def encoded(where: str, rows: list[dict], config: Config, tokenizer, most: int | None) -> tuple[list[Prompt], Counter]:
    """Up to `most` prompts of the rows, and how many rows were passed over for them. ValueError if there is none."""
    encode = Encoder(config, tokenizer)
    prompts = usable(encode, rows, most)
    if not prompts:
        reasons = ", ".join(f"{name} {count}" for name, count in encode.counts.items())
        raise ValueError(f"{where}: no usable prompt in {len(rows)} rows ({reasons})")
    return prompts, encode.counts


def similarity() -> dict[str, Callable[[list[str]], float | None]]:
    """The measures of SIMILARITY whose package is installed."""
    return {name: function for name, (package, function) in SIMILARITY.items() if find_spec(package) is not None}


def record(evaluator: Evaluator, results: list[Result], averages: list[Result]) -> dict:
    """The JSON file: what was asked, of what, with what, and the estimates."""
    request, rollout = evaluator.request, evaluator.config.rollout
    return {
        "model": request.folder if request.step is None else f"{request.run} step {request.step}",
        "seed": request.config.seed,
        "sampling": {
            "temperature": request.temperature,
            "top_p": rollout.top_p,
            "max_tokens": rollout.max_tokens,
        },
        "environment": environment.now(evaluator.engine.name),
        "benchmarks": {result.name: result.to_json() for result in results},
        "averages": {result.name: result.to_json() for result in averages},
    }


if __name__ == "__main__":
    sys.exit(main())
