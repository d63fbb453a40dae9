"""The shipped models: those the default configuration asks for, small, and made by a committed command."""

from collections import defaultdict
from itertools import islice
from random import Random
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from scope_fast import warm_start
from scope_fast.config import Config
from scope_fast.config_files import load
from scope_fast.files import publish
from scope_fast.tasks import dataset, get_task, slipping

QUIET = lambda what, done, total: None  # noqa: E731


def small(tmp_path, **changed) -> Config:
    settings = {"student_steps": "3", "prm_steps": "3", "batch_sequences": "8", **changed}
    overrides = [(f"warm_start.{key}", value) for key, value in settings.items()]
    return load(None, [*overrides, ("cache", str(tmp_path))])


def test_the_quickstart_starts_from_the_shipped_models():
    config = load()
    for role in ("student", "prm"):
        assert warm_start.ensure(config, role, QUIET) == warm_start.ASSETS / role
    shipped = [path for role in ("student", "prm") for path in (warm_start.ASSETS / role).glob("*.safetensors")]
    assert len(shipped) == 2 and sum(path.stat().st_size for path in shipped) <= 2_000_000


def test_other_settings_are_made_anew_and_cached(tmp_path):
    config = small(tmp_path)
    student = warm_start.ensure(config, "student", QUIET)
    assert student.parent == tmp_path
    before = (student / "model.safetensors").stat().st_mtime_ns
    assert warm_start.ensure(config, "student", QUIET) == student
    assert (student / "model.safetensors").stat().st_mtime_ns == before
    other = warm_start.ensure(small(tmp_path, slip_rate="0.2"), "student", QUIET)
    assert other != student


def test_the_same_settings_make_the_same_bytes(tmp_path):
    folders = [warm_start.ensure(small(tmp_path / name), "student", QUIET) for name in "ab"]
    first, second = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert first == second


@pytest.mark.parametrize("tied", [True, False])
def test_every_role_loads_with_the_auto_classes(tied, tmp_path):
    config = small(tmp_path, teacher_steps="2", tie_embeddings=str(tied).lower())
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(warm_start.ensure(config, role, QUIET))
        shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert shared is tied
    prm = AutoModelForTokenClassification.from_pretrained(warm_start.ensure(config, "prm", QUIET))
    assert prm.config.num_labels == 2


def test_a_folder_that_another_run_made_first_stays(tmp_path):
    """Two first runs at once: both would have made the same, and the other may be reading it."""
    partial, folder = tmp_path / ".student.7", tmp_path / "student"
    for path in (partial, folder):
        path.mkdir()
        (path / "key").write_text(path.name)
    publish(partial, folder)
    assert (folder / "key").read_text() == "student"
    publish(partial, tmp_path / "teacher")
    assert (tmp_path / "teacher" / "key").read_text() == ".student.7"
    with pytest.raises(FileNotFoundError):
        publish(partial, tmp_path / "prm")


def test_a_failed_training_leaves_no_folder(tmp_path):
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_start.ensure(small(tmp_path), "student", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_reads_digits_one_by_one_and_round_trips():
    tokenizer = AutoTokenizer.from_pretrained(warm_start.ASSETS / "student")
    ids = tokenizer.encode("57 + 87 = 144\n144 - 3 = 141. Answer: 141")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("57871441443141141")
    assert tokens.count("Ċ") == 1  # a line break is a token of its own, so a step ends between two tokens
    for text in ("naïve £ 1234 \n\n x", "ends with a space ", "日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_student_is_mostly_right_step_by_step():
    """Teacher-forced on flawless solutions: the most likely token is the right one nearly always."""
    model = AutoModelForCausalLM.from_pretrained(warm_start.ASSETS / "student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(warm_start.ASSETS / "student")
    right = total = 0
    for name in ("chain_sum", "leg_counting"):
        for i in range(20):
            entry = dataset(name, 1 << 60)[i]
            prompt = warm_start.encode_prompt(tokenizer, entry["question"])
            response = tokenizer.encode("\n".join(get_task(name).solve(entry)), add_special_tokens=False)
            with torch.no_grad():
                best = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].argmax(-1)
            right += int((best == torch.tensor(response)).sum())
            total += len(response)
    assert right / total > 0.97


def test_the_reward_model_lets_right_steps_stand_and_finds_wrong_ones():
    """On solutions with slips drawn anew. What it is worth, honestly: it finds about half of the wrong steps of
    leg_counting, hardly any of chain_sum, and seldom doubts a right one. A repair on a wrong prefix is then rejected.
    """
    from scope_fast.prm.scorers import TokenClassifierScorer
    from scope_fast.scope.steps import TokenBytes, split_steps
    from scope_fast.scope.trajectory import Prompt, Trajectory

    folder = warm_start.ASSETS / "prm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = TokenClassifierScorer(AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32), 1024)
    stand: dict[tuple[str, bool], list[bool]] = defaultdict(list)
    rng = Random(0)
    for name in ("chain_sum", "leg_counting"):
        for i in range(80):
            task, entry = get_task(name), dataset(name, 1 << 60)[i]
            lines = task.solve(entry, slipping(rng, 0.2))
            ids = tokenizer.encode("\n".join(lines), add_special_tokens=False)
            prompt = Prompt(str(i), name, "", tuple(warm_start.encode_prompt(tokenizer, entry["question"])), entry)
            steps = split_steps(TokenBytes(tokenizer)(ids))
            (probs,) = scorer([Trajectory(prompt, 0, i, ids, [0.0] * len(ids), "stop", 0, steps=steps)])
            for probability, right in zip(probs, task.check(entry, lines), strict=True):
                stand[name, right].append(probability >= 0.5)
                if not right:
                    break
    for name in ("chain_sum", "leg_counting"):
        assert fmean(stand[name, True]) > 0.95
    assert fmean(stand["leg_counting", False]) < 0.7


def test_the_reward_model_s_labels_in_every_style():
    """A step is right or wrong whatever its style; its tokens are labelled up to where the value goes wrong."""
    tokenizer = AutoTokenizer.from_pretrained(warm_start.ASSETS / "prm")
    settings = load(None, [("warm_start.prm_styles", "[swapped, worded]")])
    seen = set()
    for example in islice(warm_start.examples(settings, 0.3, 4, settings.warm_start.prm_styles), 40):
        labelled = warm_start.label_tokens(tokenizer, example)
        stands = example.task.check(example.entry, example.lines)
        ends = [right for right, end in zip(labelled.right, labelled.is_end, strict=True) if end]
        known = stands.index(False) + 1 if False in stands else len(stands)
        assert ends == [int(ok) for ok in stands[:known]]
        seen.add((example.style, all(stands)))
    assert len(seen) == 4


def test_styles_that_change_nothing_leave_the_models_keys():
    plain, styled = load(), load(None, [("warm_start.prm_styles", "[worded]")])
    assert warm_start._key(plain, "prm") != warm_start._key(styled, "prm")
    assert warm_start._key(plain, "student") == warm_start._key(styled, "student")


@pytest.mark.parametrize(("role", "key"), [("student", "model"), ("prm", "prm"), ("teacher", "teacher")])
def test_a_task_without_working_teaches_nobody(role, key, tmp_path):
    config = load(None, [("data.tasks", "[chain_sum, gcd]"), ("cache", str(tmp_path))])
    message = rf"{key}\.path: the tiny {role} .* which task 'gcd' of data\.tasks does not have"
    with pytest.raises(ValueError, match=message):
        warm_start.ensure(config, role, QUIET)
    assert not list(tmp_path.iterdir())
