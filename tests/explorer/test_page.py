"""The page in Chromium, over a corpus whose words are markup: numbers, sliders, keys, links, exports, long texts."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
from chromium import chromium, serving
from conftest import TINY_MODEL
from explorer_oracle import column, packed

from fairseq.explorer.app import make_app
from fairseq.explorer.explanation import Explanation
from fairseq.explorer.export import as_html, export, read_page
from fairseq.explorer.neighbors import NeighborTexts
from fairseq.explorer.rules import Rule, Setting
from fairseq.explorer.text_table import CandidateArrays, TextTable
from fairseq.explorer.words import NumberWords
from fairseq_cli import eval_lm, preprocess, train
from fairseq_cli.web.explore import KINDS

pytestmark = [pytest.mark.page, pytest.mark.slow]

MARKUP = [
    "<img/src=x/onerror=window.pwned=1>",
    "</script><script>window.pwned=1</script>",
    "<b>bold</b>",
    "&lt;i&gt;",
    "\"'><svg/onload=window.pwned=1>",
    "{{7*7}}",
    "javascript:window.pwned=1",
    "caf\u00e9",
    "\u202eabc",
]
KNN = ("--knnlm", "--lmbda", "0.3", "--softmax-temp", "2", "--k", "16")


class Site(NamedTuple):
    """A page that is served, what it shows, and what the evaluation said."""

    url: str
    explanation: Explanation
    figures: dict[str, float]
    logp: np.ndarray
    words: list[str]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(browser, tmp_path_factory):
    """eval-lm at work over a corpus of markup."""
    folder, random = tmp_path_factory.mktemp("markup"), np.random.default_rng(0)
    for split, count in (("train", 200), ("valid", 60)):
        lines = [" ".join(random.choice(MARKUP, random.integers(3, 12))) for _ in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [f"--{split}pref={folder / split}.txt" for split in ("train", "valid")]
    preprocess.main(["--only-source", *texts, "--destdir", str(folder / "bin")])
    model = [word if word != "20,40" else "6,9" for word in TINY_MODEL]
    train.main([str(folder / "bin"), "--save-dir", str(folder), "--max-update", "3", *model])
    path = [str(folder / "bin"), "--path", str(folder / "checkpoint_last.pt"), "--cpu", "--max-tokens", "64"]
    eval_lm.main([*path, "--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", str(folder / "d")])
    words = [*path, "--gen-subset", "valid", *KNN, "--dstore-filename", str(folder / "d")]
    eval_lm.main([*words, "--eval-file", str(folder / "e.json"), "--scores-file", str(folder / "e.npz")])
    figures, logp = json.loads((folder / "e.json").read_text()), np.load(folder / "e.npz")["logp"]
    with KINDS["eval-lm"](words)[1]() as opened:
        opened.finish()
        with serving(make_app(opened.explanation)) as url:
            yield Site(url, opened.explanation, figures, logp, words)


@pytest.fixture
def served():
    """Serve an explanation; returns its address."""
    with contextlib.ExitStack() as servers:
        yield lambda explanation, **more: servers.enter_context(serving(make_app(explanation), **more))


@pytest.fixture
def visit(browser, served):
    """Open an address; at the end nothing was logged, nothing was fetched elsewhere and no markup has run."""
    pages, faults = [], []

    def call(url, **more):
        page = browser.new_page(**more)
        page.on("console", lambda said: faults.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith(own) else None)
        own = ("data:", "blob:", url.split("#")[0].rsplit("/", 1)[0])
        page.goto(url)
        page.wait_for_selector(".t:not(.waits)", state="attached")
        pages.append(page)
        return page

    yield call
    for page in pages:
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("document.querySelectorAll('.pane img, .pane b, .pane svg.x, aside img').length") == 0
        page.close()
    assert not faults


def wait(page, condition):
    """Until a condition holds. Playwright's own way evaluates text within the page, which the page's policy forbids."""
    deadline = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def value(page, selector):
    wait(page, f"document.querySelector({selector!r})?.dataset.value !== undefined")
    return float(page.evaluate(f"document.querySelector({selector!r}).dataset.value"))


def slide(page, name, to):
    move = "([name, to]) => { by(name).value = to; by(name).dispatchEvent(new Event('input')); }"
    page.evaluate(move, [name, to])


def settle(page):
    """Wait until the server's figures of the whole text are there."""
    wait(page, "document.getElementById('whole-mixed').textContent !== '\\u2026'")


def test_numbers_are_those_of_the_evaluation(visit, site):
    page = visit(site.url)
    assert value(page, "#whole-mixed") == pytest.approx(site.figures["perplexity"], rel=1e-6)
    shown = page.evaluate("[...document.querySelectorAll('#text .t')].map((t) => t.textContent)")
    assert shown[: len(MARKUP)] == site.explanation.tokens(slice(0, len(MARKUP)))["text"]
    assert set(shown) <= {*MARKUP, "</s>"}
    for at in (0, 7, len(site.logp) - 1):
        page.evaluate(f"main.choose({at})")
        wait(page, f"choice && choice.at === {at} && choice.details")
        for name, expected in (("both, ln p", site.logp[at]), ("model, ln p", column(site.explanation, "lm")[at])):
            assert value(page, f'dd[data-name="{name}"]') == pytest.approx(expected, abs=1e-6)
    assert page.inner_text("#neighbors li:first-child mark") in {*MARKUP, "</s>"}


def sum_of_impossible(site, query):
    answer = httpx.get(f"{site.url}api/combined?{query}", trust_env=False)
    return answer.json()["sums"]["mixed"]["num_impossible"]


def test_sliders_give_other_evaluations(visit, site, tmp_path):
    out = ["--eval-file", str(tmp_path / "e.json"), "--scores-file", str(tmp_path / "e.npz")]
    eval_lm.main([*site.words, *out, "--lmbda", "0.6", "--softmax-temp", "10", "--k", "4"])
    figures, logp = json.loads((tmp_path / "e.json").read_text()), np.load(tmp_path / "e.npz")["logp"]
    page = visit(site.url)
    slide(page, "lmbda", 0.6), slide(page, "temperature", 1), slide(page, "k", math.log(4) / math.log(16))
    wait(page, "main.shown.every((chunk) => chunk.pool)")
    settle(page)
    assert value(page, "#whole-mixed") == pytest.approx(figures["perplexity"], rel=1e-6)
    made = np.array(page.evaluate("main.shown.flatMap((chunk) => [...chunk.made.mixed])"))
    np.testing.assert_allclose(made, logp[: len(made)], atol=1e-5)
    if len(made) == len(logp):
        assert value(page, "#shown-mixed") == pytest.approx(figures["perplexity"], rel=1e-6)
    assert "lmbda=0.6" in page.url
    assert "k=4" in page.url
    slide(page, "lmbda", 1)
    wait(page, "document.getElementById('whole-mixed').textContent.includes('of p = 0')")
    dropped = sum_of_impossible(site, "k=4&lmbda=1&temperature=10")
    assert dropped > 0
    assert page.inner_text("#whole-mixed").endswith(f" without {dropped:,} of p = 0")
    page.click("#reset")
    wait(page, "!document.getElementById('whole-mixed').textContent.includes('of p = 0')")
    settle(page)
    assert value(page, "#whole-mixed") == pytest.approx(site.figures["perplexity"], rel=1e-6)


def test_keys_choose_tokens_and_a_link_keeps_everything(visit, site):
    page = visit(site.url)
    page.focus("#text")
    for key, at in (
        ("ArrowRight", 0),
        ("ArrowRight", 1),
        ("End", len(site.logp) - 1),
        ("ArrowLeft", len(site.logp) - 2),
    ):
        page.keyboard.press(key)
        wait(page, f"state.at === {at} && choice && choice.details")
    page.keyboard.press("Home")
    wait(page, "state.at === 0")
    page.keyboard.press("ArrowDown")
    wait(page, "state.at > 1")
    page.keyboard.press("g")
    gained = int(np.argmax(column(site.explanation, "mixed") - column(site.explanation, "lm")))
    wait(page, f"state.at === {gained}")
    slide(page, "lmbda", 0.5)
    page.click("#theme")
    again = visit(page.url)
    wait(again, "choice && choice.details")
    assert again.evaluate("[state.at, state.setting.lmbda, isDark()]") == [gained, 0.5, True]
    assert again.inner_text("#chosen-word") == page.inner_text("#chosen-word")


def test_three_distributions_add_up(visit, site):
    page = visit(site.url)
    page.evaluate("main.choose(5)")
    wait(page, "choice && choice.details")
    sums = page.evaluate(
        "(() => { const {view, tokens, pool, i, details} = choice;"
        "const d = distributions(view, {columns: tokens.columns, pool, i, mixed: tokens.columns.mixed[i]}, details);"
        "const sum = (map) => [...map.values()].reduce((a, b) => a + b, 0);"
        "return [sum(d.lm), sum(d.memory), sum(d.mixed), d.exact]; })()"
    )
    # The vocabulary is smaller than the number of words that are sent, so that nothing is missing.
    assert sums == [pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-4), True]
    assert page.locator(".trio table").count() == 3


def test_a_prefix_is_read_and_continued(visit, site):
    page = visit(site.url)
    page.click("#tab-typing")
    page.fill("#prefix", f"{MARKUP[0]} {MARKUP[2]}")
    page.click("#typing button[type=submit]")
    wait(page, "typed && typed.shown.length && choice && choice.next")
    assert page.evaluate("[...document.querySelectorAll('#typed .t')].map((t) => t.textContent)") == [
        MARKUP[0],
        MARKUP[2],
    ]
    assert page.inner_text("#chosen-word") == "Next token"
    bars = page.locator("#details .mixed tr")
    best = bars.first.locator("td").first.inner_text().strip()
    page.click("#one-more")
    wait(page, "typed && typed.count === 3 && !continuing")
    assert page.input_value("#prefix").split(" ")[2] == best
    again = visit(page.url)
    wait(again, "typed && typed.count === 3")


def test_plots_are_drawn_from_the_whole_text(visit, site):
    page = visit(site.url)
    page.click("#tab-plots")
    page.wait_for_selector("#plots figure")
    titles = page.locator("figcaption").all_inner_texts()
    assert titles == [
        "Gain by frequency of the token",
        "Gain by squared distance of the nearest neighbour",
        "Gain by document",
    ]
    gain = (site.logp - column(site.explanation, "lm")) / math.log(2)
    said = page.evaluate(
        "[...document.querySelectorAll('#plots figure:nth-child(3) rect title')].map((t) => t.textContent)"
    )
    assert float(said[0].split(": ")[1].split(" ")[0]) == pytest.approx(gain.mean(), abs=1e-5)


def test_an_exported_page_works_alone(visit, site, tmp_path):
    path = tmp_path / "alone.html"
    path.write_text(as_html(read_page(), export(site.explanation, slice(0, len(site.logp)))), encoding="utf-8")
    page = visit(path.as_uri())
    assert value(page, "#whole-mixed") == pytest.approx(site.figures["perplexity"], rel=1e-6)
    slide(page, "lmbda", 0)
    settle(page)
    assert value(page, "#whole-mixed") == pytest.approx(value(page, "#whole-lm"), rel=1e-9)
    page.evaluate("main.choose(9)")
    wait(page, "choice && choice.details")
    assert page.locator("#neighbors li").count() == 12


def test_files_are_saved_from_the_page(visit, site):
    page = visit(site.url)
    for kind, begins in (("json", '{"about"'), ("html", "<!doctype html>")):
        with page.expect_download() as waiting:
            page.select_option("#save", kind)
        assert Path(waiting.value.path()).read_text(encoding="utf-8").startswith(begins)


def check_recombination(page, explanation, setting):
    """The page's formulas give what the server's give, for the first tokens."""
    made = page.evaluate(
        """async (setting) => { const stop = Math.min(200, main.count), tokens = await main.source.tokens(0, stop);
        const pool = await main.source.candidates(0, stop), made = combine(tokens, pool, main.about, setting);
        return [[...made.memory], [...made.mixed]].map((x) => x.map((y) => (y === -Infinity ? "none" : y))); }""",
        setting.to_dict(),
    )
    served = explanation.combined(setting)
    for name, values in zip(("memory", "mixed"), made):
        values = np.array([-np.inf if value == "none" else value for value in values])
        np.testing.assert_allclose(values, packed(served[name])[: len(values)], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("mode", ["gn", "li"])
def test_trime_is_recombined_and_its_memories_are_shown(visit, served, explored, explored_words, explored_store, mode):
    words = ["--use-local", "--use-long", "--mem-size", 48, "--softmax-temp", 1.5, "--use-external", "--k", 16]
    words += ["--mode", mode, "--use-interp", "--interp-temp", 2.5, "--lmbda", 0.3, "--dstore-filename", explored_store]
    explanation = explored("eval-lm-trime", *explored_words, *words)
    url = served(explanation)
    page = visit(f"{url}#at=20&colour=paid")
    wait(page, "choice && choice.details")
    check_recombination(page, explanation, Setting(5, 0.6, 4.0, 1.5))
    assert not page.is_visible("#for-joint")
    shares = page.evaluate("main.paid(choice.tokens.columns, choice.pool, choice.i).map((each) => each.share)")
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1)
    assert page.locator(".stack div").count() == 4
    assert page.locator("#local li").count() > 0
    page.click("#tab-typing")
    page.fill("#prefix", "w3 w9 w28 w14")
    page.click("#typing button[type=submit]")
    wait(page, "typed && typed.shown.length && choice && choice.next")
    assert page.locator("#details .mixed tr").count() > 0


def test_retomaton_shows_what_it_searched(visit, served, explored, explored_words, explored_store):
    words = (*KNN, "--dstore-filename", explored_store, "--retomaton", "--min-knns", 2, "--max-knns", 32)
    explanation = explored("eval-lm", *explored_words, *words)
    url = served(explanation)
    page = visit(f"{url}#at=0&colour=searched")
    wait(page, "choice && choice.details")
    assert "searched; 0 pointers were active" in page.inner_text("#details")
    check_recombination(page, explanation, Setting(None, 0.7, 5.0))
    assert not page.is_visible("#for-k")
    page.click("#tab-plots")
    page.wait_for_selector("#plots figure")
    assert "Gain where RetoMaton searched or followed" in page.locator("figcaption").all_inner_texts()


def test_translations_show_beams_and_pairs(visit, served, explored, explored_pairs):
    words, folder = explored_pairs
    knn = ["--knnmt", "--dstore-filename", folder / "store", "--k", 6, "--lmbda", 0.4, "--knn-temp", 5]
    explanation = explored("generate", *words, *knn, "--sentences", 3)
    url = served(explanation)
    page = visit(f"{url}#at=0")
    wait(page, "choice && choice.details")
    assert page.locator("#beams tr").count() == 4
    assert page.locator("#neighbors li").first.inner_text().splitlines()[-1].startswith("source: a")
    check_recombination(page, explanation, Setting(3, 0.7, 9.0))
    page.click("#tab-typing")
    page.fill("#prefix", "a1 a4 a5")
    page.click("#typing button[type=submit]")
    wait(page, "typed && typed.shown.length")
    page.evaluate("typed.choose(0)")
    wait(page, "choice && choice.view === typed && choice.details")
    assert "Typed sentence" in page.inner_text("#details")


def test_attended_memories_are_shown_by_layer(visit, served, explored, tiny_gpt2, tmp_path):
    (tmp_path / "memory.txt").write_text("w3 w9 w28 w14 w42 w57\n" * 4)
    (tmp_path / "text.txt").write_text("w5 w15 w46 w3 w9 w28 w14\n")
    words = ("--model", tiny_gpt2, "--text", tmp_path / "text.txt", "--memory", tmp_path / "memory.txt", "--topk", 3)
    explanation = explored("extended-mind", *words)
    url = served(explanation)
    page = visit(f"{url}#at=3")
    wait(page, "choice && choice.details")
    assert page.locator("#attention tr").count() == 3
    assert page.locator(".trio table").count() == 2
    assert not page.is_visible("#lmbda")
    page.click("#tab-typing")
    page.fill("#prefix", "w3 w9")
    page.click("#one-more")
    wait(page, "typed && typed.count === 3 && !continuing")
    assert page.locator("#attention tr").count() == 3


def test_a_token_goes_with_every_request(visit, served, long_text):
    url = served(long_text, token="s3cret")
    page = visit(url)
    assert value(page, "#whole-mixed") > 1
    with page.expect_download() as waiting:
        page.select_option("#save", "json")
    assert Path(waiting.value.path()).read_text(encoding="utf-8").startswith('{"about"')
    assert httpx.get(url.split("?")[0]).status_code == 401


@pytest.fixture
def long_text():
    """50,000 made-up tokens with candidates that cost nothing to make."""
    count, k = 50_000, 32
    random = np.random.default_rng(0)
    columns = {name: np.arange(count) // 500 for name in ("block", "document")}
    columns |= {"token": random.integers(0, 1000, count), "counted": np.ones(count, bool)}
    columns |= {"lm": random.normal(-5, 1, count).astype(np.float32), "norm": np.zeros(count, np.float32)}

    def fetch(rows):
        size = rows.stop - rows.start
        scores = -np.arange(k, dtype=np.float32)[None] - np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] % 7
        values = np.broadcast_to(columns["token"][rows, None] + np.arange(k) % 3, (size, k)).astype(np.int32)
        return CandidateArrays(scores, values, np.full((size, k), 5))

    table = TextTable(columns, k, fetch)
    return Explanation("knn", "long", table, NeighborTexts(NumberWords()), Rule(), Setting(k, 0.25, 1.0))


def test_a_long_text_is_never_in_the_page_as_a_whole(visit, served, long_text):
    url = served(long_text)
    page = visit(url)
    page.evaluate("main.choose(49_990)")
    wait(page, "state.at === 49990 && choice && choice.details")
    assert page.evaluate("document.querySelector('.t.chosen').textContent") == str(
        long_text.table.columns["token"][49_990]
    )
    for place in (0.2, 0.9, 0.5):
        page.evaluate(f"by('text').scrollTop = {place} * by('text').scrollHeight")
        wait(page, "main.shown.length && main.chunks.filter((c) => c.near).every((c) => c.spans)")
    assert page.locator("#text .t").count() < 4000
    assert page.evaluate("main.chunks.length") == 250
    narrow = visit(page.url.split("#")[0], viewport={"width": 360, "height": 700})
    narrow.evaluate("main.choose(1_022, true)")
    wait(narrow, "state.at === 1022 && choice && choice.at === 1022 && choice.details")
    narrow.wait_for_timeout(300)
    assert narrow.evaluate(
        """(() => { const token = document.querySelector(".t.chosen").getBoundingClientRect();
        const pane = by("text").getBoundingClientRect();
        return token.top >= pane.top && token.bottom <= pane.bottom; })()"""
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_everything_in_both_themes(visit, site, theme):
    page = visit(site.url, viewport={"width": 360, "height": 700}, color_scheme=theme)
    page.evaluate("main.choose(3)")
    wait(page, "choice && choice.details")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("#more")
    assert page.is_visible("#lmbda")
    contrast = page.evaluate(
        """() => { const light = (name) => { const hex = getComputedStyle(document.documentElement)
        .getPropertyValue(name).trim().slice(1); return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
        .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0); };
        const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
        return [["--ink", "--back"], ["--soft", "--panel"], ["--accent", "--back"], ["--hit", "--panel"]]
        .map(([a, b]) => ratio(a, b)); }"""
    )
    assert min(contrast) >= 4.5
    names = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea")].filter((e) => !(e.labels?.length ||
        e.getAttribute("aria-label") || e.textContent.trim())).length"""
    )
    assert names == 0
