"""The report's page in a real browser, asserting on what it drew. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from fixtures.arithmetic_run import write_run
from fixtures.chromium import Chromium, find_chromium
from fixtures.records import record, repair, run_with

from scope_fast import report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the path (apt-get install chromium)")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "arithmetic"
    write_run(folder, steps=12, prompts=6, group_size=4)
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def rollouts(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def page(browser, run_dir):
    browser.problems.clear()
    browser.requests.clear()

    def open_page(hash_text: str = "", **options) -> Chromium:
        browser.open(f"file://{run_dir}/report.html{hash_text}", **options)
        return browser

    yield open_page
    assert browser.problems == []
    assert {url.partition("#")[0] for url in browser.requests} == {f"file://{run_dir}/report.html"}


def texts(browser: Chromium, selector: str) -> list[str]:
    return browser.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")


def link(record: dict) -> str:
    return f"#rollout={record['step']}-{record['group']}-{record['sample']}"


def test_draws_a_curve_for_every_series(page, run_dir):
    browser = page()
    drawn = browser.evaluate(
        "[...document.querySelectorAll('#charts [data-series]')].map((p) => [p.dataset.series, p.getAttribute('d')])"
    )
    panels = report.panels(report.series(report.read_metrics(run_dir)))["main"]
    assert {name for name, _ in drawn} == {name for panel in panels for name in panel["names"]}
    points = {name: len(re.findall("[ML]", path)) for name, path in drawn}
    assert points["reward/pass_rate"] == 12 and points["eval/pass_rate"] == 2
    assert not [name for name, path in drawn if "NaN" in path or "undefined" in path]
    assert "31.2% → 71.9%" in texts(browser, ".tile .value")
    assert texts(browser, "#facts dd")[:4] == ["scope", "tiny", "12", "0"]


def test_shows_values_on_hover_and_a_click_filters_the_step(page, run_dir):
    browser = page()
    browser.point("#charts .chart:nth-child(2) svg")
    tip = texts(browser, "#tip")[0]
    step = int(re.match(r"step (\d+)", tip)[1])
    failed = next(row["scope/failed"] for row in report.read_metrics(run_dir) if row["step"] == step)
    assert tip == f"step {step}scope/failed{failed}"
    visible = browser.evaluate("document.querySelectorAll('#charts .cross[visibility=visible]').length")
    assert visible == browser.evaluate("document.querySelectorAll('#charts .chart').length")  # one crosshair for all
    browser.point("#charts .chart:nth-child(2) svg", click=True)
    assert texts(browser, "#rollout-count") == ["24 of 288 rollouts"]
    assert browser.evaluate("document.getElementById('filter-step').value") == str(step)


def test_smoothing_can_be_switched(page):
    browser = page()
    assert browser.evaluate("document.getElementById('smooth').checked") is False  # a short run is shown as it is
    path = "document.querySelectorAll('[data-series=\"sampling/entropy\"]')"
    raw = browser.evaluate(f"[...{path}].map((p) => p.getAttribute('d'))")
    browser.point("#smooth", click=True)
    both = browser.evaluate(f"[...{path}].map((p) => p.getAttribute('d'))")
    assert len(raw) == 1 and len(both) == 2 and both[0] == raw[0] != both[1]


def test_puts_the_repaired_suffix_beside_the_failed_one(page, rollouts):
    wanted = next(
        r for r in rollouts if r["repair"] and r["repair"]["status"] == "accepted" and r["repair"]["kept_steps"] > 1
    )
    kept, k = wanted["repair"]["kept_tokens"], wanted["first_error"]
    browser = page(link(wanted))
    assert "".join(texts(browser, ".prefix .tok")) == "".join(wanted["tokens"][:kept])
    assert "".join(texts(browser, ".failed-suffix .tok")) == "".join(wanted["tokens"][kept:])
    assert "".join(texts(browser, ".side.repaired .tok")) == "".join(wanted["trained"]["tokens"][kept:])
    left, right = browser.evaluate("[...document.querySelectorAll('.side')].map((s) => s.getBoundingClientRect().x)")
    assert right > left + 100  # two columns
    assert texts(browser, ".flag") == ["✕ first error"]
    assert browser.evaluate("document.querySelector('.step.first-error').dataset.step") == str(k)
    probabilities = [f"{i + 1} · {p:.2f}" for i, p in enumerate(wanted["step_probs"])]
    assert [text for text in texts(browser, ".gutter") if text] == probabilities
    terms = dict(zip(texts(browser, ".term .label"), texts(browser, ".term b"), strict=True))
    assert terms == {name: f"{value:.3f}" for name, value in wanted["selection"].items()}


def test_colours_steps_by_probability(page, rollouts):
    wanted = next(r for r in rollouts if r["repair"] and r["first_error"] > 1 and r["step_probs"][0] > 0.8)
    browser = page(link(wanted))
    amounts = browser.evaluate("[...document.querySelectorAll('.step')].map((s) => s.style.background)")[:-1]
    for prob, background in zip(wanted["step_probs"], amounts, strict=False):
        assert f"var(--{'right' if prob >= 0.5 else 'wrong'}) calc({abs(prob - 0.5) * 2:.3f} *" in background
    browser.evaluate("document.getElementById('colour').value = 'advantage'")
    browser.evaluate("document.getElementById('colour').dispatchEvent(new Event('change'))")
    assert set(browser.evaluate("[...document.querySelectorAll('.step')].map((s) => s.style.background)")) == {
        "transparent"
    }
    advantage = wanted["trained"]["advantage"][0]
    token = browser.evaluate("document.querySelector('.prefix .tok').style.background")
    assert f"var(--{'right' if advantage >= 0 else 'wrong'}) calc({min(1, abs(advantage)):.3f} *" in token


def test_tells_each_token_s_part_in_training(page, rollouts):
    wanted = next(r for r in rollouts if r["repair"] and r["repair"]["status"] == "accepted")
    browser = page(link(wanted))

    def tip(selector: str) -> dict[str, str]:
        browser.point(selector)
        rows = "[...document.querySelectorAll('#tip .row')].map((r) => [...r.children].map((c) => c.textContent))"
        return dict(browser.evaluate(rows)) | {"token": texts(browser, "#tip .head")[0]}

    advantage = wanted["trained"]["advantage"][0]
    assert tip(".prefix .tok") == {
        "token": json.dumps(wanted["tokens"][0]),
        "log-probability": f"{wanted['logprobs'][0]:.4f}",
        "probability": f"{math.exp(wanted['logprobs'][0]):.1%}",
        "step 1": f"p = {wanted['step_probs'][0]:.3f}",
        "segment": "policy gradient",
        "advantage": f"{advantage:+.3f}",
        "loss weight": "1",
    }
    assert tip(".side.repaired .tok")["NLL weight"] == "0.300"
    assert tip(".side.repaired .tok")["segment"] == "likelihood"
    assert tip(".failed-suffix .tok")["segment"] == "not trained: replaced by the repair"


def test_filters_by_hash_and_walks_with_keys(page, rollouts):
    accepted = [r for r in rollouts if r["repair"] and r["repair"]["status"] == "accepted" and r["task"] == "chain_sum"]
    browser = page("#status=accepted&task=chain_sum")
    assert texts(browser, "#rollout-count") == [f"{len(accepted)} of {len(rollouts)} rollouts"]
    assert browser.evaluate("[...document.querySelectorAll('[aria-pressed=true]')][0].dataset.status") == "accepted"
    assert set(texts(browser, ".item .mark")) == {"✚"}
    chosen = "document.querySelector('.item[aria-selected=true]').dataset.id"
    names = [link(r).removeprefix("#rollout=") for r in accepted]
    seen = [browser.evaluate(chosen)]
    for key in "jjk":
        browser.press(key)
        seen.append(browser.evaluate(chosen))
    assert seen == [names[0], names[1], names[2], names[1]]
    assert browser.evaluate("location.hash") == f"#status=accepted&task=chain_sum&rollout={names[1]}"
    assert texts(browser, ".asked .gold") == [accepted[1]["answer"]]


def test_list_draws_only_what_is_in_sight(page, rollouts):
    browser = page("#step=")
    assert browser.evaluate("document.querySelectorAll('.item').length") < 40 < len(rollouts)
    height = browser.evaluate("document.getElementById('rows').getBoundingClientRect().height")
    assert height == 54 * len(rollouts)
    last = rollouts[-1]
    browser.follow(link(last))
    assert browser.evaluate("document.querySelector('.item[aria-selected=true]').dataset.id") == link(last)[9:]


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1440, True), (420, False)])
def test_layout_fits_and_follows_the_colour_scheme(page, rollouts, width, dark):
    wanted = next(r for r in rollouts if r["repair"] and r["repair"]["status"] == "accepted")
    browser = page(link(wanted), width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 20, 23)" if dark else "rgb(246, 246, 243)")
    sides = browser.evaluate("[...document.querySelectorAll('.side')].map((s) => s.getBoundingClientRect().x)")
    assert (sides[0] == sides[1]) == (width < 800)  # a narrow page stacks the two suffixes


def test_survives_the_odd_rollouts(browser, tmp_path):
    evil = "<img src=x onerror=\"document.title='owned'\"></script><b>bold</b>"
    trained = {"response_ids": [1, 9], "tokens": ["whole", " answer"], "segment": [2, 2], "advantage": [0.0, 0.0],
               "loss_weight": [0.5, 0.5]}  # fmt: skip
    odd = [
        record(sample=0, prompt=evil, answer=evil, task=evil, tokens=[evil, " b", "c"]),
        record(
            sample=1, tokens=[], response="", response_ids=[], logprobs=[], steps=[], step_probs=None, first_error=None
        ),
        record(
            sample=2,
            steps=None,
            step_probs=None,
            first_error=None,
            reward=None,
            verdict="crash",
            verdict_reason="KeyError: 'k'",
        ),
        record(sample=3, step_probs=[None], first_error=None, reward=1.0),
        record(sample=4, step_probs=[0.9], first_error=1, finish_reason="length"),
        record(sample=5, repair=repair("accepted", kept_tokens=0), trained=trained),
        record(
            sample=6, repair=repair("rejected", suffix_ids=[], suffix_tokens=[], suffix="loose text", reason="no way")
        ),
        record(
            sample=7, repair=repair("error", suffix_ids=[], suffix_tokens=[], suffix="", reward=None, reason="late")
        ),
        record(sample=8, trained=trained),
        record(sample=9, trained={**trained, "segment": [1, 1], "advantage": ["nan", "-inf"]}),
    ]
    run_with(tmp_path, odd)
    browser.problems.clear()
    browser.open(f"file://{report.write_report(tmp_path)}")

    def shown(sample: int) -> str:
        browser.follow(f"#rollout=1-0-{sample}")
        return browser.evaluate("document.getElementById('detail').textContent")

    assert evil in shown(0) and browser.evaluate("document.querySelectorAll('img, #detail b b').length") == 0
    assert browser.evaluate("document.title").endswith("scope_fast")
    assert "Empty completion." in shown(1)
    assert "verifier: crash" in shown(2) and "no reward" in shown(2)
    assert browser.evaluate("document.querySelector('.badge.alert').title") == "KeyError: 'k'"
    assert "1 · –" in shown(3)  # noqa: RUF001
    assert "No step is marked wrong, but the answer is" in shown(4) and "truncated" in shown(4)
    whole = shown(5)
    assert "Teacher’s response" in whole and "whole answer" in whole and "Kept prefix" not in whole  # noqa: RUF001
    assert "loose text" in shown(6) and "repaired, rejected (reward 1): no way" in shown(6)
    assert "The teacher gave no suffix." in shown(7) and "teacher error: late" in shown(7)
    assert "Trained instead" in shown(8) and "likelihood, NLL weight 0.500" in shown(8)
    shown(9)
    browser.point(".side.repaired .tok")
    assert "advantagenan" in texts(browser, "#tip")[0]
    assert browser.problems == []


def test_a_funnel_of_repairs_of_right_rollouts_fits(browser, tmp_path):
    """sft has one rollout of every group repaired, whether any failed or not."""
    counts = {"scope/failed": 2, "scope/selected": 8, "scope/repaired": 8, "scope/accepted": 4}
    run_with(tmp_path, [], [{"step": 1, **counts}])
    browser.open(f"file://{report.write_report(tmp_path)}")
    widths = browser.evaluate(
        "[...document.querySelectorAll('#funnel .fill')].map((f) => f.getBoundingClientRect().width)"
    )
    assert widths[1] == widths[2] and abs(widths[0] - widths[1] / 4) < 0.1 and abs(widths[3] - widths[1] / 2) < 0.1
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
