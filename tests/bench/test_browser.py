"""The report in a real browser: a headless Chromium that is installed here, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from camtl.bench.report import write_html

from .records import broken, failed_row, op_rows, record

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def browser_here() -> str:
    """The program: ``CAMTL_BROWSER``, or the first known one on the PATH."""
    named = os.environ.get("CAMTL_BROWSER")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH (apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed (pip install playwright)"
    )
    program = browser_here()
    with driver.sync_playwright() as playwright:
        # as root, as in most containers, Chromium has no sandbox
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=program, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine with a history, faults and several commits."""
    rows = op_rows("cuda", 1.0)
    for row in rows:
        if row["op"] == "conditional_attention" and " x 512" in row["case"]:
            for part in row["passes"].values():
                part["contenders"]["released"] = broken(
                    "baseline", "out of memory", "tried to allocate 96 GiB"
                )
                for ratios in part["ratio"].values():
                    del ratios["released"]
    faults = ("wrong", "failed", "out of memory", "interrupted")
    rows += [failed_row(status, f"<b>why</b> it is {status}", "cuda") for status in faults]
    records = [record(commit=f"old000{n}", date=f"2025-01-0{n}", faster=0.5 + 0.1 * n) for n in (1, 2, 3)]
    records += [record(rows=rows, finished=False, why="no time left"), record("model")]
    return write_html(records, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report in a fresh window; whatever the console or the network says is an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(10_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    page.goto(report.as_uri())
    yield page
    assert said == []
    context.close()


def column(page: Any, name: str, op: str = "film") -> list[str]:
    """The texts of a column in the first line of each group that is shown; "" where there is none."""
    return page.evaluate(
        """([name, op]) => {
            const table = document.querySelector(`section.op[data-op="${op}"] table.results`);
            const at = [...table.tHead.rows[0].cells].findIndex(th => th.textContent === name);
            return [...table.tBodies].filter(b => !b.hidden)
                .map(b => b.rows[0].cells[at] ? b.rows[0].cells[at].textContent.trim() : "");
        }""",
        [name, op],
    )


def heading(page: Any, name: str, op: str = "film") -> Any:
    return page.locator(f'section.op[data-op="{op}"] .results > thead th', has_text=name).first


def test_it_loads(page: Any) -> None:
    assert page.title() == "camtl benchmarks: Made-up GPU"
    assert page.locator("h2").inner_text() == "Made-up GPU"
    assert page.locator(".card").count() == 8
    assert page.locator("section.chart figure svg").count() > 20
    assert page.locator(".missing").count() == 0
    assert page.evaluate(OVERFLOW) <= 0


def test_a_click_on_a_heading_sorts(page: Any) -> None:
    def numbers() -> list[float]:
        return [float(text) for text in column(page, "ms") if text[:1].isdigit()]

    before = numbers()
    heading(page, "ms").locator("button").click()
    assert heading(page, "ms").get_attribute("aria-sort") == "descending"
    assert numbers() == sorted(before, reverse=True) != before
    heading(page, "ms").locator("button").click()
    assert heading(page, "ms").get_attribute("aria-sort") == "ascending"
    assert numbers() == sorted(before)
    # rows without a time come last, whichever way
    assert all("x 512" in case for case in column(page, "case")[-4:])
    heading(page, "case").locator("button").click()
    assert heading(page, "ms").get_attribute("aria-sort") == "none"
    cases = [case for case in column(page, "case") if case.startswith("base")]
    assert cases == ["base, 512 x 128 padded, T 8"] * 4 + ["base, 1024 x 128 padded, T 8"] * 4


def test_the_keyboard_sorts_and_opens(page: Any) -> None:
    heading(page, "share").locator("button").focus()
    page.keyboard.press("Enter")
    assert heading(page, "share").get_attribute("aria-sort") == "descending"
    more = page.locator('section.op[data-op="film"] .more').first
    more.focus()
    page.keyboard.press("Space")
    assert more.get_attribute("aria-expanded") == "true"
    detail = page.locator(f"#{more.get_attribute('aria-controls')}")
    assert detail.is_visible()
    assert detail.locator("tbody tr").count() == 6  # two of ours, four others
    assert detail.locator("code").inner_text().startswith("camtl bench ops --device cuda --repro 'ops/film/")
    page.keyboard.press("Space")
    assert not detail.is_visible()


def test_groups_stay_together_when_sorted(page: Any) -> None:
    heading(page, "eager").locator("button").click()
    groups = page.evaluate(
        """() => [...document.querySelectorAll('section.op[data-op="film"] .results > tbody')]
            .map(b => [...b.rows].map(r => (r.cells[3] || r.cells[0]).textContent.slice(0, 6)))"""
    )
    assert sum(group[:2] == ["triton", "cuda"] for group in groups) == 12


def test_filters(page: Any) -> None:
    lines = page.locator(".filter output")
    whole = lines.inner_text()
    assert whole.endswith("lines")
    page.fill("input[name=text]", 'FLOAT32 "x 512"')
    assert lines.inner_text() == f"4 of {whole}"  # of attention, with two sizes and two passes
    assert page.locator("section.op:not([hidden])").count() == 1
    page.fill("input[name=text]", "no such words")
    assert page.locator(".nothing").is_visible()
    page.locator(".filter button[type=reset]").click()
    page.wait_for_function(
        "whole => document.querySelector('.filter output').textContent === whole", arg=whole
    )
    page.select_option("select[name=op]", "conditional_bottleneck")
    page.select_option("select[name=dtype]", "bfloat16")
    page.select_option("select[name=pass]", "forward")
    assert lines.inner_text() == f"3 of {whole}"
    page.select_option("select[name=op]", "")
    page.select_option("select[name=dtype]", "")
    page.select_option("select[name=pass]", "")
    page.select_option("select[name=rows]", "bad")
    assert lines.inner_text() == f"4 of {whole}"
    assert page.locator(".results > tbody:not([hidden]) .why").all_inner_texts() == [
        f"{status} <b>why</b> it is {status}"
        for status in ("wrong", "failed", "out of memory", "interrupted")
    ]


def test_words_beside_the_pointer(page: Any) -> None:
    bar = page.locator("[data-chart=speedup] rect.bar").first
    bar.scroll_into_view_if_needed()
    bar.hover()
    tip = page.locator("#tip")
    assert "in the median of" in tip.inner_text()
    box, window = tip.bounding_box(), page.viewport_size
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= window["width"]
    page.locator("h2").hover()
    assert not tip.is_visible()


@pytest.mark.parametrize("width", [320, 380, 700])
def test_a_narrow_window_scrolls_only_within_tables(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.locator(".more").first.click()
    page.locator(".verdict.unknown summary").click()
    assert page.evaluate(OVERFLOW) <= 0
    box = page.locator('section.op[data-op="conditional_attention"] .scroll')
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.focus()
    assert box.evaluate("e => document.activeElement === e")  # so that arrow keys scroll it


def test_light_and_dark(page: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert light != dark
    theme = page.locator("#theme")
    theme.click()
    assert theme.inner_text() == "theme: light"
    assert page.evaluate(background) == light
    page.reload()  # the choice is kept
    assert page.evaluate(background) == light
    theme.click()
    assert page.evaluate(background) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: Any, scheme: str) -> None:
    """WCAG's contrast of 4.5 for what is small."""
    page.emulate_media(color_scheme=scheme)
    low = page.evaluate(
        """parts => {
            const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const light = (color, below) => {
                probe.fillStyle = below; probe.fillRect(0, 0, 1, 1);
                probe.fillStyle = color; probe.fillRect(0, 0, 1, 1);
                const parts = [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
                    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
            };
            const found = new Set();
            for (const e of document.querySelectorAll(parts)) {
                const has = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
                if (!has || !e.getClientRects().length) continue;
                const layers = [];
                for (let on = e; on; on = on.parentElement)
                    layers.unshift(getComputedStyle(on).backgroundColor);
                let below = '#fff';
                for (const layer of layers) {
                    probe.fillStyle = below; probe.fillRect(0, 0, 1, 1);
                    probe.fillStyle = layer; probe.fillRect(0, 0, 1, 1);
                    below = 'rgb(' + [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).join() + ')';
                }
                const both = [light(getComputedStyle(e).color, below), light(below, below)];
                const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
                if (contrast < 4.5) found.add(`${e.className || e.tagName} ${contrast.toFixed(1)}`);
            }
            return [...found];
        }""",
        "p, li, td, th, span, b, small, summary, button, dt, dd",
    )
    assert low == []


def test_it_prints(page: Any, tmp_path: Path) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").is_visible()
    assert not page.locator(".filter").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".verdict.unknown table").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.locator(".verdict.unknown table").is_visible()
    # the width of an A4 sheet in landscape without its margins
    page.set_viewport_size({"width": 1031, "height": 700})
    assert page.evaluate(OVERFLOW) <= 0
    document = tmp_path / "report.pdf"
    page.pdf(path=document, prefer_css_page_size=True)
    assert document.read_bytes().startswith(b"%PDF")
    assert document.stat().st_size > 50_000


def test_several_machines(browser: Any, tmp_path: Path) -> None:
    path = write_html([record(), record(device="cpu")], tmp_path / "two.html")
    page = browser.new_page(viewport={"width": 380, "height": 800})
    page.goto(path.as_uri())
    assert page.locator("nav a").all_inner_texts() == ["Made-up GPU", "Made-up CPU"]
    second = page.locator(".machine").nth(1)
    second.locator("input[name=text]").fill("film")
    outputs = page.locator(".filter output").all_inner_texts()
    assert " of " not in outputs[0]
    assert " of " in outputs[1]
    assert page.evaluate(OVERFLOW) <= 0
    page.close()


def test_without_scripts_everything_is_there(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".results > tbody").first.is_visible()
    assert page.locator("section.chart svg").first.is_visible()
    assert not page.locator("#theme").is_visible()
    context.close()
