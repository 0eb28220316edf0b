"""The page itself, in headless Chromium from a file: address: it draws, it reads, it asks for nothing, and no text of a model becomes markup."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from _browser import browser, chromium  # noqa: E402
from bench_report import make_run  # noqa: E402

from openrl_reason.observe.report import ReportConfig, asset, report  # noqa: E402

needs_browser = pytest.mark.skipif(chromium() is None, reason="no chromium on this machine (Debian: apt install chromium)")

HOSTILE = (
    "<script>document.title='owned'</script></script><!-- <img src=\"http://127.0.0.1:9/pixel\" onerror=\"document.title='owned'\">"
    "]]> ${x} %{y} \u2028\u2029 \x00\x07 \u202eevil\u202c \ud800 <b>&amp;</b> שלום עולם"
)


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "one", steps=300, trajectories=150, mean_tokens=80, seed=0)
    make_run(folder / "two", steps=200, trajectories=60, mean_tokens=80, seed=1, lift=1.5)
    return folder


@pytest.fixture(scope="module")
def page(folders):
    return report(ReportConfig(runs=(str(folders / "one"),), output=str(folders / "one.html")))


def hostile_run(folder):
    """A run in which every text is an attack: names, statuses, config, prompts, tokens."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"task": {"name": "<img src=x onerror=alert(1)>"}, "run": {"steps": 30}, "api_key": "sk-secret"}))
    metrics = [{"step": s, "event": "train", "train/reward": 0.1 * s, "<script>alert(1)</script>": s, "a<b>/</script>": s % 3} for s in range(30)]
    metrics += [{"step": 30, "event": "eval", "eval/<img src=x onerror=alert(1)>/pass@1": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    tokens = [HOSTILE[i : i + 3] for i in range(0, len(HOSTILE), 3)]
    records = [
        {"step": step, "source": HOSTILE, "trajectory_id": HOSTILE, "task_id": HOSTILE, "prompt": HOSTILE, "response": HOSTILE, "gold": HOSTILE,
         "parsed": HOSTILE, "status": HOSTILE, "detail": HOSTILE, "reward": 0.5, "reward_terms": {HOSTILE: 1.0}, "stop_reason": HOSTILE,
         "num_tokens": len(tokens), "tokens": tokens, "token_data": {"advantage": [(-1) ** t * t / 10 for t in range(len(tokens))]},
         "step_starts": [0, 4], "step_rewards": [0.0, 1.0]}
        for step in range(3)
    ]  # fmt: skip
    with (folder / "rollouts.jsonl").open("w", encoding="utf-8", errors="surrogatepass") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return folder


def errors(window):
    return window.run("document.getElementById('errors').textContent"), window.complaints()


def quiet(window):
    """Nothing went wrong, nothing was asked for but the page."""
    return errors(window) == ("", []) and all(url.startswith(("file:", "data:", "blob:")) for url in window.requests()) and (
        len([url for url in window.requests() if url.startswith("file:")]) == 1
    )  # fmt: skip


# ---- the file --------------------------------------------------------------------------------------------------------------------


def test_the_file_names_no_other_address_and_holds_only_its_own_scripts(folders, page, tmp_path):
    for file in (page, report(ReportConfig(runs=(str(hostile_run(tmp_path / "<b>run</b>")),), output=str(tmp_path / "x.html")))):
        text = file.read_text()
        assert len(re.findall(r"<script(?! type=\"application/octet-stream\")", text)) == 1
        assert text.count("</script") == text.count("<script")
        data = re.findall(r"<script type=\"application/octet-stream\"[^>]*>([^<]*)</script>", text)
        assert data and all(re.fullmatch(r"[A-Za-z0-9+/=]+", block) for block in data)
        assert "default-src 'none'" in text and "unsafe-eval" not in text
        assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", text)
        assert "sk-secret" not in text and "alert(1)" not in text


def test_writing_again_gives_the_same_page_but_for_its_date(folders, tmp_path):
    texts = [report(ReportConfig(runs=(str(folders / "two"),), output=str(tmp_path / name))).read_text() for name in ("a.html", "b.html")]
    without_meta = [re.sub(r'<script type="application/octet-stream" id="data-meta">[^<]*', "", text) for text in texts]
    assert without_meta[0] == without_meta[1]


def test_text_has_enough_contrast_on_light_and_dark():
    blocks = re.findall(r":root(?:\[[^]]*\])? \{(.*?)\}", asset("report.css"), re.DOTALL)[:2]
    for block in blocks:
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for text in ("text", "muted", "accent", "critical", "warning", "notice"):
            for paper in ("page", "card", "soft"):
                assert contrast(colors[text], colors[paper]) >= 4.5, (text, paper)
        for pill in ("pill-bad", "pill-middle", "pill-good"):
            assert contrast(colors["text"], colors[pill]) >= 4.5, pill
        for full in ("positive", "negative"):  # tokens are never darker than 85 % of it
            assert contrast(colors["text"], mixed(colors[full], colors["page"], 0.85)) >= 4.5, full


def mixed(first, second, share):
    parts = [round(share * int(first[i : i + 2], 16) + (1 - share) * int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def contrast(first, second):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


# ---- in the browser --------------------------------------------------------------------------------------------------------------


@needs_browser
def test_charts_alarms_and_trajectories_are_drawn_without_an_error_or_a_request(window, page):
    window.open(page, "draw=all")
    assert quiet(window), (errors(window), window.requests())
    charts = window.run("document.querySelectorAll('figure .plot').length")
    assert charts > 30 and window.run("[...document.querySelectorAll('figure .plot')].every(box => box.querySelector('.main-svg'))")
    assert window.run("document.querySelectorAll('.scatterlayer path.js-line').length") > 50
    assert window.run("document.querySelectorAll('.barlayer path').length") > 100
    assert window.run("document.querySelectorAll('.alarm').length") >= 4
    assert window.run("document.querySelector('.count').textContent") == "150 responses"
    assert window.run("document.querySelectorAll('#detail .t').length") > 40
    assert "arithmetic/pass@1" in window.run("document.getElementById('overview').textContent")


@needs_browser
def test_the_page_also_loads_by_the_command_line_alone(page, tmp_path):
    command = [
        chromium(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--virtual-time-budget=60000",
        "--dump-dom",
    ]
    document = subprocess.run([*command, page.as_uri() + "#draw=all"], capture_output=True, text=True, errors="replace", timeout=120).stdout
    root = re.search("<html[^>]*>", document)[0]
    assert 'data-errors="0"' in root and "data-ready=" in root and 'data-resources="0"' in root
    assert document.count('class="row"') == 60 and "js-plotly-plot" in document


@needs_browser
def test_hostile_text_stays_text(window, tmp_path):
    window.open(
        report(ReportConfig(runs=(str(hostile_run(tmp_path / "run")),), output=str(tmp_path / "x.html"), title="<script>1</script>")), "draw=all"
    )
    assert quiet(window), (errors(window), window.requests())
    assert window.run("document.title") == "<script>1</script>"
    assert window.run("document.querySelectorAll('img, iframe, object, #main script, #detail b b').length") == 0
    tokens = window.run("[...document.querySelectorAll('#detail .t')].map(span => span.textContent).join('')")
    assert tokens.startswith("<script>document.title='owned'</script></script><!-- <img src=") and "<b>&amp;</b> שלום" in tokens
    assert "␀␇" in tokens and "⟨U+202E⟩" in tokens and "⟨U+2028⟩" in tokens and "\u202e" not in tokens
    prompt = window.run("document.querySelector('#detail .prompt').textContent")
    assert prompt.replace("\ufffd", "") == tokens.replace("\ufffd", "")
    assert window.run("getComputedStyle(document.querySelector('#detail .tokens > div > div')).unicodeBidi") == "plaintext"
    assert "***" in window.run("document.getElementById('config').textContent")
    window.run("tip = document.querySelector('#detail .t:nth-child(2)'); tip.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    assert "advantage" in window.run("document.getElementById('tip').textContent")


@needs_browser
def test_filters_search_and_order_pick_the_right_trajectories(window, folders, page):
    window.open(page)
    records = [json.loads(line) for line in (folders / "one" / "rollouts.jsonl").open()]

    window.run("document.querySelector(`[aria-label='reward from']`).value = '0.5'")
    window.run("document.querySelector(`[aria-label='reward from']`).dispatchEvent(new Event('input', {bubbles: true}))")
    right = sum(record["reward"] >= 0.5 for record in records)
    window.wait(f"document.querySelector('.count').textContent.startsWith('{right} of')")
    wanted = records[77]["prompt"].split("?")[0].upper()
    window.run("document.querySelector('form button').click()")
    window.run(f"s = document.querySelector('form [type=search]'); s.value = '{wanted}'; s.dispatchEvent(new Event('input', {{bubbles: true}}))")
    window.wait("document.querySelector('.count').textContent.startsWith('5 of')")
    window.wait(f"document.querySelector('#detail .prompt').textContent === {json.dumps(records[77]['prompt'])}")
    window.run("document.querySelector('form button').click()")
    window.wait("document.querySelector('.count').textContent === '150 responses'")
    order = "[...document.querySelectorAll('form select')].find(s => [...s.options].some(o => o.value === '-length'))"
    window.run(f"o = {order}; o.value = '-length'; o.dispatchEvent(new Event('input', {{bubbles: true}}))")
    longest = max(record["num_tokens"] for record in records)
    window.wait(f"document.querySelector('.row .meta').textContent.includes('{longest} tok')")
    assert quiet(window), errors(window)


@needs_browser
def test_keys_walk_through_trajectories_and_siblings_and_numbers_are_those_of_the_file(window, folders, page):
    window.open(page)
    records = sorted(map(json.loads, (folders / "one" / "rollouts.jsonl").open()), key=lambda record: record["step"])
    at = "document.documentElement.dataset.detail"
    window.wait(f"{at} === '0'")
    for key, expected in (("j", 1), ("j", 2), ("k", 1), ("]", 2), ("]", 3), ("[", 2)):
        window.key(key)
        window.wait(f"{at} === '{expected}'")
    record = records[2]
    window.run("document.querySelectorAll('#detail .t')[7].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    shown = window.run("[...document.querySelectorAll('#tip .number')].map(cell => cell.textContent)")
    names = ("advantage", "value", "logprob_ratio", "logprob")
    assert [float(text.replace("−", "-")) for text in shown] == [pytest.approx(record["token_data"][name][7], rel=6e-3, abs=1e-6) for name in names]
    assert window.run("document.querySelectorAll('#detail .step').length") == len(record["step_starts"])
    before = window.run("document.getElementById('colour').value")
    window.key("c")
    assert window.run("document.getElementById('colour').value") != before
    assert quiet(window), errors(window)


@needs_browser
def test_several_runs_are_overlaid_and_can_be_hidden(window, folders):
    page = report(ReportConfig(runs=(str(folders / "one"), str(folders / "two")), output=str(folders / "both.html")))
    window.open(page, "draw=all&theme=dark")
    figure = "[...document.querySelectorAll('figure')].find(f => f.dataset.metrics === 'train/reward')"
    lines = f"{figure}.querySelectorAll('path.js-line').length"
    assert window.run(lines) == 4  # raw and smoothed, of two runs
    window.run(f"{figure}.scrollIntoView()")
    window.run("document.querySelectorAll('.run-legend input')[1].click()")
    window.wait(f"{lines} === 2")
    assert window.run("document.documentElement.dataset.theme") == "dark"
    assert quiet(window), errors(window)


@needs_browser
def test_a_zoom_in_one_chart_moves_the_others(window, page):
    window.open(page)
    window.run("document.getElementById('reward').scrollIntoView()")
    plots = "[...document.querySelectorAll('#reward .plot')]"
    window.wait(f"{plots}.slice(0, 2).every(box => box.dataset.drawn)")
    window.run(f"Plotly.relayout({plots}[0], {{'xaxis.range[0]': 50, 'xaxis.range[1]': 80}}).then(() => 0)")
    window.wait(f"{plots}[1].layout.xaxis.range[0] === 50")
    window.run("document.getElementById('zoom-reset').click()")
    window.wait(f"{plots}[1].layout.xaxis.range[0] <= 0 && document.getElementById('zoom-reset').hidden")


@needs_browser
@pytest.mark.parametrize("files", [["metrics.jsonl"], ["rollouts.jsonl"], ["config.yaml", "metrics.jsonl"]])
def test_a_run_of_which_only_part_is_there_gives_a_page(window, folders, tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes((folders / "one" / name).read_bytes()[: 10_000 if name != "config.yaml" else None])
    window.open(report(ReportConfig(runs=(str(tmp_path),))), "draw=all")
    assert quiet(window), errors(window)


@needs_browser
def test_a_very_long_response_is_opened_piece_by_piece_and_right_to_left_text_keeps_its_place(window, tmp_path):
    long = {"step": 0, "prompt": "ما هو 2 + 2؟", "response": "word " * 20_000, "reward": None, "num_tokens": 20_000, "tokens": ["word "] * 20_000}
    plain = {"step": 1, "prompt": "old", "response": "x" * 100_000, "reward": 1.0}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(plain) + "\n")
    window.open(report(ReportConfig(runs=(str(tmp_path),))))
    window.wait("document.querySelectorAll('#detail .t').length === 1500")
    assert window.run("document.documentElement.scrollWidth <= window.innerWidth")
    window.run("document.querySelector('#detail .more').click()")
    window.wait("document.querySelectorAll('#detail .t').length === 20000")
    window.key("j")
    window.wait("document.documentElement.dataset.detail === '1'")
    assert window.run("document.querySelector('#detail .more').textContent").startswith("show 92")
    assert quiet(window), errors(window)


@needs_browser
def test_a_phone_shows_everything_without_scrolling_sideways(folders, page):
    with browser(width=390, height=844) as phone:
        phone.resize(390, 844)
        phone.open(page, "draw=all")
        assert phone.run("document.documentElement.scrollWidth") <= 390
        assert quiet(phone), errors(phone)


@needs_browser
def test_on_paper_every_chart_is_drawn_dark_on_white(window, page):
    window.open(page, "theme=dark")
    window.call("Page.printToPDF")
    assert window.run("[...document.querySelectorAll('.plot')].every(box => box.dataset.drawn)")
    window.wait("document.documentElement.dataset.theme === 'dark' && !document.body.classList.contains('printing')")
    assert quiet(window), errors(window)
