"""The report: its sentences, charts, tables and files, from records whose numbers are known."""

from __future__ import annotations

import html
import html.parser
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from camtl.bench import views
from camtl.bench.report import charts, markdown_table, render, sentences, tables, write_html
from camtl.bench.targets import MET, TARGETS, Judgement
from camtl.errors import UsageError

from .records import HOSTILE, broken, failed_row, model_row, op_row, op_rows, record


def machine(*records: dict[str, Any]) -> views.Machine:
    (found,) = views.machines(records)
    return found


class Checked(html.parser.HTMLParser):
    """Whether tags close in order; all text and attributes that a reader would see."""

    VOID = frozenset({"meta", "link", "input", "br", "wbr", "hr", "img"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """As of SVG."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Checked:
    found = Checked()
    found.feed(page)
    found.close()
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    return found


# -- records that belong together


def test_machines_and_commits() -> None:
    old, new = record(commit="a", date="2026-01-01"), record(commit="b", date="2026-02-01")
    model = record("model", commit="b", date="2026-02-02")
    cpu = record(device="cpu", date="2025-01-01")
    gpu, other = views.machines([cpu, new, model, old])
    assert (gpu.device, other.device) == ("cuda", "cpu")
    assert gpu.records == [new, model]
    assert gpu.history == [old, new, model]
    assert len(gpu.rows()) == len(new["rows"]) + len(model["rows"])


def test_a_row_measured_twice_counts_once() -> None:
    first, second = (op_row("film", "base", 4, 128, "float32", "cpu", faster=f) for f in (1.0, 2.0))
    assert views.merged([record(rows=[first]), record(rows=[second])]) == [second]
    cut = second | {"status": "interrupted"}
    assert views.merged([record(rows=[first]), record(rows=[cut])]) == [first]


def test_smoke_runs_say_nothing_beside_others() -> None:
    smoke, real = record(shapes="smoke", date="2026-02-01"), record(date="2026-01-01")
    assert machine(smoke, real).records == [real]
    assert machine(smoke).records == [smoke]


@pytest.mark.parametrize(
    ("case", "tokens", "found"),
    [
        ("base, 64 x 128 padded, T 8", 8192, (64, 128)),
        ("base, 64 x 128 packed, T 8", 3000, (64, 128)),
        ("base, 32 x 128 GLUE lengths, T 8", 1500, (32, 128)),
        ("base, 2048 x 3072", 2048, None),
        ("T 8, B 32, D 768", 0, None),
    ],
)
def test_lengths_are_read_from_names(case: str, tokens: int, found: tuple[int, int] | None) -> None:
    assert views.lengths({"case": case, "tokens": tokens}) == found


# -- sentences


def test_a_headline_in_words() -> None:
    rows = [op_row("film", "base", n, 128, "float32", "cpu") for n in (1, 2, 3)]
    for row, (eager, compiled, share) in zip(
        rows, ((2.0, 1.2, 0.5), (2.4, 1.3, 0.61), (9.0, 1.9, 0.9)), strict=True
    ):
        part = row["passes"]["both"]
        part |= {"ratio": {"cpu": {"compile": compiled, "eager": eager}}, "share": {"cpu": share}}
    (found,) = sentences.headlines(machine(record(device="cpu", rows=rows)))
    assert str(found) == "film: 2.4x eager, 1.30x compile (medians of 3 cases); 61% of the copy bandwidth."


def test_an_op_without_baselines() -> None:
    row = op_row("film", "base", 1, 128, "float32", "cpu")
    row["passes"]["both"] |= {"ratio": {}, "share": {}}
    (found,) = sentences.headlines(machine(record(device="cpu", rows=[row])))
    assert str(found) == "film: timed in 1 case, with no baseline beside it."


def test_correctness_names_every_fault() -> None:
    good = op_row("film", "base", 1, 128, "float32", "cuda")
    bad = [failed_row("wrong", "off", "cuda"), failed_row("out of memory", "96 GiB", "cuda")]
    assert (
        sentences.correctness(machine(record(rows=[good])))
        == "1 row: no result was wrong, and nothing failed."
    )
    found = sentences.correctness(machine(record(rows=[good, *bad])))
    assert found == "1 of 3 rows are right and have times; 1 wrong, 1 out of memory."
    assert sentences.correctness(machine(record(rows=[]))) == "Nothing was measured."


def test_slower_names_the_worst() -> None:
    row = op_row("film", "base", 1, 128, "float32", "cpu")
    row["passes"]["both"]["ratio"]["cpu"] = {"eager": 0.9, "compile": 0.5}
    found = sentences.slower(machine(record(device="cpu", rows=[row])))
    assert found.startswith(
        "In 1 row some baseline is faster than ours. At worst compile takes 50% of our time"
    )


def test_who_does_less_is_no_faster_baseline() -> None:
    step = {"plain step padded": 0.4, "forward passes": 0.2, "eager padded": 1.5}
    row = model_row("uncertainty step", "base, 8 x 128 full, T 8", "cpu", step, 50.0, 1024, 8)
    found = machine(record("model", "cpu", rows=[row]))
    assert sentences.slower(found) == "No baseline is faster than ours in any row."
    (headline,) = sentences.headlines(found)
    assert headline.ratios == {"eager padded": 1.5}
    assert "; plain step padded 0.40; forward passes 0.20" in "; " + markdown_table(found.records[0])
    assert ">0.40×<" in render(found.records)


def test_large_numbers_have_no_decimals() -> None:
    target = next(t for t in TARGETS if t.unit == "x")
    assert sentences.value(Judgement(target, 2949.33, MET)) == "2,949x"
    assert sentences.value(Judgement(target, 1.357, MET)) == "1.36x"
    target = next(t for t in TARGETS if t.unit == "s")
    assert sentences.value(Judgement(target, 0.0123, MET)) == "12.3 ms"
    assert sentences.value(Judgement(target, 4.5, MET)) == "4.50 s"


def test_noise_and_the_unfinished() -> None:
    assert "1.0% in the median and by 7.0% at worst" in sentences.noise(machine(record()))
    assert sentences.noise(machine(record(noise={}))) == "Noise was not measured: nothing was timed twice."
    assert sentences.unfinished(machine(record())) == ""
    found = sentences.unfinished(machine(record(finished=False, why="stopped by hand")))
    assert found == "Not everything was measured (ops: stopped by hand)."


def test_warnings() -> None:
    assert sentences.warnings(machine(record())) == []
    doubtful = record(shapes="smoke")
    doubtful["environment"] |= {"interpreted": True, "changed": True}
    assert [text.split()[0] for text in sentences.warnings(machine(doubtful))] == ["This", "Triton", "Files"]
    assert sentences.threads(machine(record(device="cpu"))) == "2 threads of 2 cores"


# -- charts


def test_speedups_are_medians_with_their_cases() -> None:
    rows = [op_row("film", "base", n, 128, "float32", "cpu") for n in (1, 2, 3)]
    for row, ratio in zip(rows, (1.0, 2.0, 8.0), strict=True):
        row["passes"]["both"]["ratio"]["cpu"] = {"eager": ratio}
    (panel,) = charts.speedups(machine(record(device="cpu", rows=rows))).panels
    (bar,) = panel.bars
    assert (panel.title, bar.label, bar.low, bar.value, bar.high) == ("film", "eager", 1.0, 2.0, 8.0)
    assert [value for value, _ in bar.dots] == [1.0, 2.0, 8.0]


def test_time_against_tokens_joins_what_is_alike() -> None:
    rows = [op_row("film", e, B, 128, "float32", "cpu") for e, B in (("base", 8), ("base", 2), ("large", 2))]
    (panel,) = charts.tokens(machine(record(device="cpu", rows=rows))).panels
    ours = next(series for series in panel.series if series.ours)
    assert [[point.x for point in run] for run in ours.runs] == [[256.0, 1024.0], [256.0]]
    times = [row["passes"]["both"]["contenders"]["cpu"]["ms"]["p50"] for row in rows]
    assert [[point.y for point in run] for run in ours.runs] == [[times[1], times[0]], [times[2]]]


def test_attention_gets_a_panel_for_each_length() -> None:
    found = charts.tokens(machine(record()))
    names = [panel.title for panel in found.panels if panel.title.startswith("conditional_attention")]
    assert names == [f"conditional_attention, bfloat16, S {S}" for S in (64, 128, 256, 512)]


def test_roofline_lies_below_its_roofs() -> None:
    found = charts.roofline(machine(record()))
    assert [panel.title for panel in found.panels] == ["float32", "bfloat16"]
    for panel in found.panels:
        slope, flat = panel.roofs
        assert slope.points[-1] == flat.points[0]
        for point in (point for series in panel.series for point in series.points):
            assert point.y < min(flat.points[0].y, slope.points[0].y * point.x / slope.points[0].x)


def test_memory_per_token() -> None:
    (panel,) = charts.memory(machine(record())).panels
    ours = next(series for series in panel.series if series.name == "triton")
    ys = [point.y for point in ours.runs[0]]
    assert [point.x for point in ours.runs[0]] == [64.0, 128.0, 256.0, 512.0]
    assert ys == [pytest.approx(3 * 768 * 2 / 1024)] * 4


def test_history_compares_the_cases_that_all_commits_have() -> None:
    rows = [op_row("film", "base", n, 128, "float32", "cpu") for n in (1, 2)]
    for row, ratio in zip(rows, (2.0, 50.0), strict=True):
        row["passes"]["both"]["ratio"]["cpu"] = {"eager": ratio}
    first = record(device="cpu", commit="a", date="2026-01-01", rows=rows[:1])
    second = record(device="cpu", commit="b", date="2026-01-02", rows=rows)
    (panel,) = charts.history(machine(first, second)).panels
    assert [(p.x, p.y) for p in panel.series[0].points] == [(0.0, 2.0), (1.0, 2.0)]
    assert [text for _, text in panel.ticks] == ["a", "b"]
    assert not charts.history(machine(second)).panels


def test_charts_without_data_say_why() -> None:
    row = failed_row("failed", "no kernel", "cpu")
    page = render([record(device="cpu", rows=[row])])
    for chart in charts.all_charts(machine(record(device="cpu", rows=[row]))):
        assert not chart.panels
        assert f"Not drawn: {chart.missing}." in html.unescape(page)


def test_every_series_of_a_panel_has_a_style_of_its_own() -> None:
    for chart in charts.all_charts(machine(record(), record(commit="b", date="2027"))):
        for panel in chart.panels:
            styles = charts.styles(panel)
            assert len(set(styles.values())) == len(panel.series)


def test_styles_of_many_series() -> None:
    names = [*(f"ours {n}" for n in range(6)), "eager", "compile", *(f"other {n}" for n in range(9))]
    styles = charts.styles(
        charts.Panel("x", series=[charts.Series(n, [], n.startswith("ours")) for n in names])
    )
    assert len(set(styles.values())) == len(names)
    assert (styles["ours 0"], styles["eager"], styles["compile"]) == (0, 2, 3)


@pytest.mark.parametrize(("low", "high"), [(0.4, 7.0), (1.0, 1.2), (1e-3, 1e4), (3.0, 3.9), (60.0, 70000.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = charts.nice_ticks(low, high)
    assert len(found) <= 7
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in found)


# -- the page


def test_the_page_is_one_sound_file(tmp_path: Path) -> None:
    path = write_html([record(), record("model"), record(device="cpu")], tmp_path / "deep" / "report.html")
    page = path.read_text(encoding="utf-8")
    parsed(page)
    assert not re.search(
        r"https?://|@import|url\(|<img|<iframe|src=|<link(?! rel=\"icon\" href=\"data:,\")", page
    )
    assert "default-src 'none'" in page


def test_everything_of_a_record_is_on_the_page() -> None:
    bad = [
        failed_row(status, f"because of {status}", "cuda") for status in ("wrong", "failed", "out of memory")
    ]
    rows = op_rows("cuda", 1.0)
    rows[0]["passes"]["both"]["contenders"]["fla"] = broken("baseline", "absent", "not installed here")
    found = parsed(render([record(rows=[*rows, *bad], finished=False, why="no time left")]))
    text = " ".join(found.text)
    for row in rows:
        assert row["case"] in text
        assert row["id"] in text  # the command that measures it again
    for words in (
        *(f"because of {status}" for status in ("wrong", "failed", "out of memory")),
        *("not installed here", "no time left", "liger-kernel", "Made-up GPU", "aaa0001"),
        *("4,000.0 GB/s", "800 TFLOP/s", "noise at worst 7.0%", "not measured"),
    ):
        assert words in text, words


def test_all_text_is_escaped() -> None:
    row = op_row("film", "base", 1, 128, "float32", "cuda")
    row |= {"case": HOSTILE, "id": HOSTILE, "op": HOSTILE, "dtype": HOSTILE}
    for part in row["passes"].values():
        part["contenders"][HOSTILE] = broken("baseline", HOSTILE, HOSTILE)
        part["contenders"]["triton " + HOSTILE] = part["contenders"]["triton"]
        part["ratio"]["triton"][HOSTILE] = 2.0
        part["bound"] = HOSTILE
    bad = failed_row("wrong", HOSTILE, "cuda") | {"status": HOSTILE}
    one = record(rows=[row, bad], commit=HOSTILE, finished=False, why=HOSTILE, shapes=HOSTILE)
    one["environment"] |= dict.fromkeys(("gpu", "cpu", "torch", "driver", "date", "machine"), HOSTILE)
    one["environment"]["absent"] = {HOSTILE: HOSTILE}
    one["ceilings"] = one["ceilings"] | {f"matmul_flops_per_s_{HOSTILE}": 1e12}
    page = render([one])
    assert parsed(page).scripts == 1
    assert "<script>alert" not in page


def test_dollars_do_not_reach_the_template() -> None:
    row = op_row("film", "base", 1, 128, "float32", "cuda") | {"case": "$title ${body} $$"}
    assert "$title ${body} $$" in " ".join(parsed(render([record(rows=[row])])).text)


def test_a_report_of_nothing() -> None:
    with pytest.raises(UsageError, match="at least one record"):
        render([])
    parsed(render([record(rows=[], ceilings={}, noise={})]))


def test_old_commits_are_history_alone() -> None:
    first = record(commit="old0001", date="2025-01-01", faster=0.5)
    page = render([record(commit="new0002"), first])
    found = machine(first, record(commit="new0002"))
    assert page.count('class="more"') == 2 * len(found.rows())
    assert "old0001" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.00001234, "0.0000123"),
        (0.0123, "0.0123"),
        (1.2, "1.20"),
        (99.96, "100"),
        (12345.6, "12,346"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert tables.significant(value) == text
