"""Configuration: typed, validated, one class per room. How files and `--dotted.key value` get here: config_files.py.

Every choice the sources leave open is a field whose description says "our reading; not stated in the
sources" (SCOPE, arXiv 2602.24110, as far as its text was available to us).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from scope_fast.batch import LossOptions

OURS = "our reading; not stated in the sources"

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**20)]  # Random(-n) is Random(n); every seed has a million numbers of its own
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Source = Annotated[str, AfterValidator(expanduser)]  # a file, a folder or a hub name; no shell expands a file's ~
Style = Literal["plain", "swapped", "worded"]  # tasks.STYLES


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        if isinstance(value, bool) and bool not in plain_types(cls.model_fields[info.field_name].annotation):
            raise ValueError("expected another value than true or false")
        return value


def _of_a_run(info: ValidationInfo) -> bool:
    """Whether a run's own file is being read: an older version may have run with options that do nothing there."""
    return bool(info.context and info.context.get("of_a_run"))


def plain_types(annotation: Any) -> Iterator[Any]:
    """The types that a field's annotation admits: of a union each, without what Annotated adds."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        inner = get_args(annotation)
        for part in inner[:1] if get_origin(annotation) is Annotated else inner:
            yield from plain_types(part)
    else:
        yield get_origin(annotation) or annotation


class WarmStart(_Section):
    """How the tiny student, its reward model and its stronger sister are made (scope_fast/warm_start.py)."""

    hidden_size: Positive = 128
    num_layers: Positive = 3
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    intermediate_size: Positive = 240
    vocab_size: int = Field(512, ge=258, description="256 bytes, two special tokens, and merges")
    tie_embeddings: bool = True
    student_steps: Positive = Field(900, description="optimiser steps on imperfect worked solutions")
    teacher_steps: Positive = Field(300, description="further steps of the stronger model, on flawless solutions")
    prm_steps: Positive = Field(1200, description="optimiser steps of the process reward model on step labels")
    tasks: list[str] | None = Field(None, min_length=1, description="what the models are made on; None: data.tasks")
    slip_rate: Share = Field(0.1, description="share of the student's training steps with a wrong result")
    student_styles: list[Style] = Field(
        ["plain"], min_length=1, description="how the student's solutions are written, one drawn for each"
    )
    prm_slip_rate: Share = Field(0.3, description="share of wrong steps in the reward model's training solutions")
    prm_styles: list[Style] = Field(["plain"], min_length=1, description="how those are written, one drawn for each")
    batch_sequences: Positive = 64
    lr: float = Field(3e-3, gt=0)
    seed: Seed = 0

    @model_validator(mode="after")
    def _makes_a_model(self) -> WarmStart:
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(f"hidden_size={self.hidden_size}: expected an even number for each of num_heads")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads}: expected a multiple of num_kv_heads={self.num_kv_heads}")
        return self

    @property
    def architecture(self) -> dict[str, Any]:
        """The models' sizes, in transformers' words."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "tie_word_embeddings": self.tie_embeddings,
        }


class Model(_Section):
    """The student. path: a Hugging Face folder or hub name, or "tiny" for the warm-started embedded model."""

    path: Source = "tiny"
    config: dict[str, Any] | None = Field(
        None, description="its configuration (model_type, hidden_size, ...), for the plan of a model that is not here"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="of computation; auto: bfloat16 where this machine has instructions for it, or float32"
    )


class Data(_Section):
    """Where prompts come from. path: a data set; without one, tasks: of the embedded ones, which have worked solutions,
    or any generator of reasoning-gym by its name, at its own defaults.

    path: a JSONL file; or, with the extra "data", a parquet, JSON, CSV or arrow file, a folder or a hub name. Columns
    are found by the usual conventions (scope_fast/sources.py). Rows without a prompt or an answer are an error.
    """

    tasks: list[str] = Field(default_factory=lambda: ["chain_sum", "leg_counting"], min_length=1)
    path: Source | None = None
    subset: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set, or of a folder of splits")
    prompt_column: str | None = Field(None, description='"a.b" looks inside column a')
    answer_column: str | None = None
    choices_column: str | None = Field(None, description="options of multiple-choice questions")
    distractor_columns: list[str] = Field([], description="the wrong options, where the answer column is the right one")
    instruction: str = Field("", description="a line added to every prompt, say how to write the answer")
    examples: list[tuple[str, str]] = Field([], description="worked examples, earlier turns of every prompt's chat")
    dedup: bool = Field(False, description="drop rows of a prompt that came before; they are counted in any case")
    min_prompt_tokens: Positive = 1
    max_prompt_tokens: Positive | None = Field(None, description="None: what rollout.context leaves")
    heldout: Positive = Field(256, description="prompts set aside for evaluation; never trained on")

    @model_validator(mode="after")
    def _reads_what_is_named(self, info: ValidationInfo) -> Data:
        columns = ("subset", "prompt_column", "answer_column", "choices_column", "distractor_columns")
        if self.path is None and not _of_a_run(info) and (named := [name for name in columns if getattr(self, name)]):
            raise ValueError(f"{named[0]}: of a data set at data.path, and none is named")
        if self.choices_column and self.distractor_columns:
            raise ValueError("choices_column: the options are there, or in distractor_columns beside the right one")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < self.min_prompt_tokens:
            raise ValueError(f"max_prompt_tokens={self.max_prompt_tokens} < min_prompt_tokens={self.min_prompt_tokens}")
        return self


class Rollout(_Section):
    """Sampling from the student."""

    engine: Literal["auto", "vllm", "vllm_server", "transformers"] = "auto"
    server_url: str | None = Field(None, description="engine vllm_server: one that runs already; None: start one")
    server_gpus: list[int] | None = Field(
        None,
        min_length=1,
        description="CUDA devices of a server started here, as this process counts them; None: the learner's GPU",
    )
    server_workers: Positive = Field(1, description="of the server at server_url, where nccl carries the weights")
    transfer: Literal["auto", "shm", "ipc", "nccl"] = Field("auto", description="what carries the weights to a server")
    transfer_address: str = Field("127.0.0.1", description="nccl: of this machine as the server reaches it")
    overlap: Literal["none", "one_step"] = Field(
        "none", description="one_step: the next step's rollouts run while this one is learned from (sampler.py)"
    )
    sync_timeout_s: float = Field(600.0, gt=0, description="longest wait of a weight sync")
    start_timeout_s: float = Field(600.0, gt=0, description="engine vllm_server: longest wait for one to be up")
    generate_timeout_s: float = Field(3600.0, gt=0, description="engine vllm_server: longest wait for a response")
    prompts_per_step: Positive = 16
    group_size: int = Field(8, ge=2, description="rollouts per prompt, G")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1.0, description="of evaluations too; keep 1.0: the learner knows no nucleus")
    max_tokens: Positive = 128
    context: Positive = Field(256, description="prompt and response together; longer prompts are skipped and counted")
    max_num_seqs: Positive = Field(256, description="most sequences the engine decodes at once")
    kv_cache_gib: float = Field(1.0, ge=2**-10, description="vLLM's cache on CPU")
    gpu_memory_utilization: float = Field(
        0.4, gt=0, lt=1, description="vLLM's share of a GPU it shares with the learner"
    )
    sleep_level: Literal[0, 1, 2] = Field(
        0, description="vLLM's, while the learner has the GPU: 1 frees its cache, 2 its weights too"
    )
    num_threads: Positive | None = Field(None, description="torch's threads while sampling on CPU; None: all")

    @field_validator("server_url")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
            raise ValueError("expected http://HOST:PORT")
        return url

    @field_validator("server_gpus")
    @classmethod
    def _each_once(cls, gpus: list[int] | None) -> list[int] | None:
        if gpus is not None and (len(set(gpus)) < len(gpus) or min(gpus) < 0):
            raise ValueError("expected devices from 0 on, each once")
        return gpus


class Verifier(_Section):
    """score: "module:function" taking (response, entry) and returning (reward, answer); runs in killable workers. A
    reward above 0 is a pass, whatever its size: such a rollout is not repaired."""

    score: str = "scope_fast.tasks:score"
    workers: Positive = 2
    timeout_s: float = Field(5.0, gt=0)


class Prm(_Section):
    """The process reward model.

    kind "exact": the task's own checker. "token_classifier": two labels, the student's tokenizer, read at step ends.
    "qwen2.5-math-prm", "math-shepherd", "rlhflow": published models, given the steps' text in their own template
    (scope_fast/prm/formats.py).
    path: a Hugging Face folder or hub name, or "tiny" for the warm-started token classifier.
    engine: "vllm" runs qwen2.5-math-prm in vLLM's STEP pooling.
    monitor: score the failed rollouts of methods that do not need it too, for the near-miss metrics.
    """

    kind: Literal["token_classifier", "exact", "qwen2.5-math-prm", "math-shepherd", "rlhflow"] = "token_classifier"
    path: Source = "tiny"
    engine: Literal["in-process", "vllm"] = "in-process"
    monitor: bool = True
    tau: Share = Field(0.5, description="a step stands while its probability is at least this (SCOPE: 0.5)")
    token_budget: Positive = Field(1024, description="tokens of one scoring pass")
    gpu_memory_utilization: float = Field(
        0.2, gt=0, lt=1, description="engine vllm: its share of a GPU it shares with the learner and the sampler"
    )

    @model_validator(mode="after")
    def _has_a_model(self, info: ValidationInfo) -> Prm:
        if self.path != "tiny" and self.kind == "exact" and not _of_a_run(info):
            raise ValueError("path: kind exact is the task's own checker and reads no model")
        if self.path == "tiny" and self.kind not in ("token_classifier", "exact"):
            raise ValueError(f"path: kind {self.kind} needs a Hugging Face folder or hub name")
        if self.engine == "vllm" and self.kind != "qwen2.5-math-prm":
            raise ValueError(f"engine: vllm pools the steps of qwen2.5-math-prm alone, not of {self.kind}")
        return self


class Endpoint(_Section):
    """An OpenAI-compatible server as teacher (scope_fast/teacher_endpoint.py; extra "endpoint").

    tokenizer: of the served model, a folder or hub name, or "student" where it is known to be the student's. Where it
    equals the student's, token ids are sent on the completions route; else messages and the prefix text on the chat
    route, which must continue it.
    concurrency, max_requests and max_total_tokens are each rank's own: under torchrun with N ranks the server sees up
    to N times as many.
    """

    url: str = Field("", description="base URL, up to and with /v1")
    model: str = Field("", description="the name it is served under")
    tokenizer: Source | None = None
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable of the key; unset: no key is sent")
    concurrency: Positive = Field(16, description="most requests in flight, of each rank")
    request_timeout_s: float = Field(60.0, gt=0)
    retries: int = Field(4, ge=0, description="after 429, 5xx, timeouts, lost connections and replies that are no JSON")
    backoff_s: float = Field(0.5, gt=0, description="first wait, doubled at every retry, times a draw from [0.5, 1]")
    max_requests: Positive | None = Field(None, description="each rank's budget of requests, retries included")
    max_total_tokens: Positive | None = Field(None, description="each rank's budget of tokens, as the server counts")
    cache: str | None = Field(None, description="folder of finished replies, by request")


class Teacher(_Section):
    """kind "solver" continues with the task's own worked solution, "model" samples from a stronger model at `path`,
    "endpoint" asks a server."""

    kind: Literal["solver", "model", "endpoint"] = "solver"
    path: Source = Field(
        "tiny", description='a Hugging Face folder sharing the tokenizer, or "tiny" for the warm-started one'
    )
    engine: Literal["auto", "vllm", "transformers"] = Field("transformers", description="of kind model")
    gpu_memory_utilization: float = Field(
        0.2, gt=0, lt=1, description="of kind model in vLLM: its share of a GPU it shares with the student"
    )
    endpoint: Endpoint = Endpoint()
    styles: list[Style] = Field(["plain"], min_length=1, description="of kind solver: one is drawn for every suffix")
    keep_style: bool = Field(
        True,
        description="of kind solver: go on in the style of the prefix's last step, where it has one (bench/NOTES.md)",
    )
    temperature: float = Field(0.0, ge=0, description="of kinds model and endpoint (a solver draws only a style)")
    timeout_s: float = Field(60.0, gt=0, description="for all requests of a step together")
    max_tokens: Positive = Field(128, description="budget of a suffix; one that does not finish within it is rejected")

    @model_validator(mode="after")
    def _is_what_is_named(self, info: ValidationInfo) -> Teacher:
        if self.kind != "model" and self.path != "tiny" and not _of_a_run(info):
            raise ValueError(f"path: only kind model is loaded from one, and kind is {self.kind}")
        if self.kind != "endpoint" and self.endpoint.url and not _of_a_run(info):
            raise ValueError(f"endpoint.url: only kind endpoint asks it, and kind is {self.kind}")
        if self.kind == "endpoint" and not (self.endpoint.url and self.endpoint.model):
            raise ValueError("endpoint: kind endpoint needs endpoint.url and endpoint.model")
        return self


def unescaped(text: str) -> str:
    """A separator as one writes it in a shell: \\n for a line break, \\t for a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


class Scope(_Section):
    """Which failed rollouts are repaired, and how."""

    max_repaired_per_group: Positive = Field(1, description=OURS)
    repair_below: Annotated[float, Field(gt=0, le=1.0)] = Field(
        0.5, description=f"only groups with a success rate below this are repaired (as AMPO); {OURS}"
    )
    length_penalty: bool = Field(True, description=f"alpha and beta, exp(-z^2/2) of the lengths; False: both 1; {OURS}")
    step_separator: str = Field(
        "\n", min_length=1, description='ends a step, with the line breaks behind it; "\\n\\n": blank lines, as Qwen'
    )
    selection: Literal["score", "random"] = Field("score", description="random: the ablation of the score")

    @field_validator("step_separator")
    @classmethod
    def _from_a_shell(cls, text: str) -> str:
        return unescaped(text)


class Loss(_Section):
    """The objective. Fields named as in `LossOptions` are passed on to it."""

    clip_low: float = Field(
        0.2, description="clips nothing in a step's first update, whose ratios are 1; nor does clip_high"
    )
    clip_high: float = 0.2
    dual_clip: float | None = None
    policy_loss: Literal["ppo", "cispo"] = "ppo"
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coef: float = Field(0.0, ge=0)
    entropy_coef: float = 0.0
    importance_cap: float | None = None
    nll_weight: Literal["constant", "advantage", "shaped", "entropy"] = Field("constant", description=OURS)
    nll_coef: float = Field(0.3, ge=0, description=f"scale of the likelihood on the suffix; {OURS}")
    nll_normalizer: Literal["own", "joint"] = Field(
        "own", description=f"divide by the count of NLL tokens, or of all trained tokens (as LUFFY); {OURS}"
    )
    advantage_std: bool = Field(
        False, description=f"divide advantages by the group's standard deviation (prm_reward always does); {OURS}"
    )
    baseline_includes_repaired: bool = Field(
        True, description=f"baseline over the group after replacement, or over its original rewards; {OURS}"
    )
    logits_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="between a bfloat16 head and its softmax; a float32 head's are float32"
    )
    chunk_tokens: int | None = None
    backend: Literal["reference", "triton", "cpu"] | None = Field(
        None, description="None: the fastest there is for each op (ops/dispatch.py), csrc/cuda's among them"
    )

    def options(self, temperature: float) -> LossOptions:
        """The op's options; advantage-weighted likelihood is folded into the weights, so it is "constant" there."""
        mine = self.model_dump(include=set(LossOptions.__dataclass_fields__))
        shape = "constant" if self.nll_weight == "advantage" else self.nll_weight
        return LossOptions(**mine, nll_shape=shape, temperature=temperature)


class Learner(_Section):
    """The optimiser and its batches."""

    lr: float = Field(1e-6, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = Field(1.0, gt=0)
    token_budget: Positive = Field(1024, description="packed tokens of one micro-batch")
    minibatches: Positive = Field(1, description="optimiser steps an epoch; 1 with epochs 1 needs no old logprobs")
    epochs: Positive = 1
    max_skipped_updates: Positive = Field(
        3, description="optimiser steps in a row without a finite loss and gradient, after which the run ends"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="recompute no block, every other block or every block in the backward"
    )
    attention: Literal["auto", "flash_attention_2", "packed_sdpa", "sdpa", "flex_attention", "eager"] = Field(
        "auto",
        description="auto: flash-attn on a GPU that has it installed, else packed_sdpa (attention.py)",
    )
    liger: bool = Field(False, description="liger-kernel's RMSNorm, RoPE and SwiGLU (CUDA only)")
    shard_size: Positive | None = Field(None, description="ranks that share one copy of the model; None: a node's")
    cpu_offload: bool = Field(False, description="sharded weights and optimiser state live in host memory")
    peak_tflops: float | None = Field(
        None, gt=0, description="of one device, for perf/mfu; None: the data sheet's of a GPU known by name (flops.py)"
    )


class Evaluation(_Section):
    """Held-out evaluation inside a run: before the first and after the last step."""

    prompts: Positive = 256
    samples: Positive = Field(2, description="of each prompt; one at temperature 0")
    temperature: float = Field(1.0, ge=0)


class Checkpoint(_Section):
    """every: steps between checkpoints (0: only at the end). keep: how many stay on disk."""

    every: int = Field(20, ge=0)
    keep: Positive = 2


class Logging(_Section):
    """tensorboard and the two JSONL files are always written."""

    wandb_project: str | None = None
    rollouts_every: Positive = Field(
        1,
        description="steps between those in rollouts.jsonl (70 bytes a token); --replay needs those since a checkpoint",
    )
    report: bool = Field(True, description="write report.html at the end")


class Distributed(_Section):
    """Several processes under torchrun.

    timeout_s: longest wait for another rank before the run ends with an error.
    gpus, gpus_per_node, gpu_memory_gib: what --dry-run plans for; gpus None: no plan of memory.
    """

    timeout_s: float = Field(1800.0, gt=0)
    gpus: Positive | None = None
    gpus_per_node: Positive = 8
    gpu_memory_gib: float = Field(80.0, gt=0)


class Config(_Section):
    """A whole run."""

    method: Literal["scope", "grpo", "replace", "prm_reward", "sft"] = "scope"
    steps: Positive = 60
    seed: Seed = 0
    out: str = Field("runs/{method}-seed{seed}", description="run directory; {method} and {seed} are filled in")
    cache: str = Field("~/.cache/scope_fast", description="warm-started models, by a hash of their settings")
    model: Model = Model()
    data: Data = Data()
    warm_start: WarmStart = WarmStart()
    rollout: Rollout = Rollout()
    verifier: Verifier = Verifier()
    prm: Prm = Prm()
    teacher: Teacher = Teacher()
    scope: Scope = Scope()
    loss: Loss = Loss()
    learner: Learner = Learner()
    distributed: Distributed = Distributed()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Config:
        try:
            self.loss_options()
        except ValueError as error:
            raise ValueError(f"loss.{error}") from None
        try:
            str(self.run_dir)
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"out={self.out!r}: only {{method}} and {{seed}} are filled in ({error})") from None
        if self.rollout.max_tokens >= self.rollout.context:
            raise ValueError(
                f"rollout.max_tokens={self.rollout.max_tokens} leaves no room for a prompt in "
                f"rollout.context={self.rollout.context}"
            )
        asked = [n for n in ("server_url", "server_gpus") if getattr(self.rollout, n) is not None]
        asked += ["transfer"] if self.rollout.transfer != "auto" else []
        if asked and self.rollout.engine != "vllm_server":
            raise ValueError(
                f"rollout.{asked[0]}: only rollout.engine vllm_server has a server, it is {self.rollout.engine}"
            )
        if self.rollout.server_url is not None and self.rollout.server_gpus is not None:
            raise ValueError("rollout.server_gpus: the server at rollout.server_url has its own")
        if self.rollout.server_workers > 1 and self.rollout.server_url is None and not _of_a_run(info):
            raise ValueError(
                "rollout.server_workers: of the server at rollout.server_url; one started here has a worker for each "
                "of rollout.server_gpus"
            )
        if 0 in (self.rollout.server_gpus or ()) and self.rollout.transfer in ("auto", "nccl"):
            raise ValueError(
                f"rollout.server_gpus={self.rollout.server_gpus}: 0 is the learner's, and NCCL takes a GPU once; take "
                "others, leave server_gpus out (the server shares the learner's then), or set rollout.transfer: shm"
            )
        if self.rollout.sleep_level and self.rollout.engine in ("vllm_server", "transformers"):
            raise ValueError(f"rollout.sleep_level: only vLLM in this process sleeps, not {self.rollout.engine}")
        if self.loss.kl != "none" and self.loss.kl_coef == 0.0:
            raise ValueError(f"loss.kl={self.loss.kl} without loss.kl_coef would do nothing")
        unread = self.loss.kl != "none" or self.loss.entropy_coef != 0.0
        if self.method == "sft" and unread and not _of_a_run(info):
            named = "kl" if self.loss.kl != "none" else "entropy_coef"
            raise ValueError(f"loss.{named}: of the policy gradient, and sft trains by likelihood alone")
        if self.rollout.overlap == "one_step":
            if self.rollout.engine != "vllm_server":
                raise ValueError(
                    "rollout.overlap: one_step needs rollout.engine vllm_server: an engine in this process cannot "
                    "sample while it learns"
                )
            if self.loss.importance_cap is None:
                raise ValueError(
                    "rollout.overlap: one_step trains on tokens of older weights, which loss.importance_cap corrects "
                    "for; set it (2 is usual)"
                )
        if self.learner.minibatches > self.rollout.prompts_per_step:
            raise ValueError(
                f"learner.minibatches={self.learner.minibatches} exceeds "
                f"rollout.prompts_per_step={self.rollout.prompts_per_step}: groups are not split"
            )
        return self

    def loss_options(self) -> LossOptions:
        """The op's options. sft's likelihood is the plain one, whatever the other methods' suffixes are weighted by."""
        loss = self.loss if self.method != "sft" else self.loss.model_copy(update={"nll_weight": "constant"})
        return loss.options(self.rollout.temperature)

    @property
    def repairs(self) -> bool:
        """Whether the method asks a teacher."""
        return self.method in ("scope", "replace", "sft")

    @property
    def scores_steps(self) -> bool:
        """Whether the process reward model is asked, by the method or for the metrics."""
        return self.prm.monitor or self.method in ("scope", "replace", "prm_reward")

    @property
    def run_dir(self) -> Path:
        """The run directory, placeholders filled in."""
        return Path(self.out.format(method=self.method, seed=self.seed)).expanduser()


def digest(*settings: Any) -> str:
    """A short hash that names plain settings: equal settings, equal name."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
