"""Figures and the page: complete, self-contained, labelled, and true to the numbers."""

from __future__ import annotations

import base64
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tamoe.experiments.demo_table import tables
from tamoe.experiments.exchanges_figure import exchanges_figure
from tamoe.experiments.figures import draw_all
from tamoe.experiments.results import Document, complete_setting, empty_strategy, time_to_loss
from tamoe.report import MAX_REPORT_BYTES, render_report, verdict, write_report
from tamoe.report_exchanges import exchanges_section, exchanges_verdict
from tamoe.topology.errors import InputError

from .results_examples import STRATEGIES, example_setting

FIGURES = {"links", "dispatch", "throughput", "exchanges", "exchange", "loss", "quality"}
VOID = {"meta", "img", "br"}


class _Page(HTMLParser):
    """Checks nesting and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset") and v]
        if tag == "img":
            self.images.append(values)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    assert not parser.open
    return parser


@pytest.fixture(scope="module")
def document() -> Document:
    return {
        **example_setting(),
        "settings": [example_setting("published share", "4x2:160mbit")],
        "command": "tamoe demo -o 'my <folder>'",
        "made": {"torch": "2.x", "cores": 2},
    }


@pytest.fixture(scope="module")
def figures(document: Document, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return draw_all(document, tmp_path_factory.mktemp("figures"))


def test_the_page_is_one_small_file_that_needs_no_network(
    document: Document, figures: list[dict[str, str]], tmp_path: Path
) -> None:
    path = write_report(document, figures, tmp_path / "report.html")
    assert path.stat().st_size < MAX_REPORT_BYTES
    page = path.read_text()
    parsed = _parsed(page)
    assert len(parsed.images) == 2 * len(FIGURES)
    assert all(reference.startswith("data:") for reference in parsed.references)
    assert "<script" not in page and "@import" not in page and "url(" not in page


def test_every_setting_has_all_figures_and_each_says_that_it_is_emulated(
    figures: list[dict[str, str]],
) -> None:
    for setting in ("steep", "published share"):
        assert {f["name"] for f in figures if f["setting"] == setting} == FIGURES
    for figure in figures:
        svg = Path(figure["path"]).read_bytes()
        assert base64.b64decode(figure["data_uri"].split(",")[1]) == svg
        # matplotlib writes each text it draws as a comment before its outlines
        texts = " ".join(re.findall(r"<!--(.*?)-->", svg.decode(), flags=re.DOTALL))
        cluster = "4x2:50mbit" if figure["setting"] == "steep" else "4x2:160mbit"
        assert f"({cluster}, emulated)" in texts, figure["name"]


def test_the_table_comes_first_and_shows_every_strategy(
    document: Document, figures: list[dict[str, str]]
) -> None:
    page = render_report(document, figures)
    assert page.index("<table") < page.index('class="verdict"') < page.index("<figure")
    table = page[page.index("<table") : page.index("</table>")]
    for name, *_ in STRATEGIES:
        assert f"<th scope='row'>{name}</th>" in table
    assert "my &lt;folder&gt;" in page and "my <folder>" not in page


def test_the_paragraph_says_what_was_gained_and_what_it_cost() -> None:
    setting = example_setting()
    best = setting["strategies"][-1]
    text = verdict(setting)
    assert "“bias kl=0.3”" in text
    assert f"{best['speedup_over_even']:.1f} times as many tokens a second" in text
    assert "5% of its bytes crossed node links in place of 75%" in text
    assert f"{best['val_loss_over_even']:.1%} worse than even's" in text
    assert f"1/{best['speedup_to_even_loss']:.2f} of the time" in text


def test_a_loss_that_nobody_reached_is_said_and_shown_as_a_dash() -> None:
    setting = example_setting()
    for strategy in setting["strategies"][1:]:
        strategy["speedup_to_even_loss"] = strategy["time_to_even_loss_s"] = None
    assert "No strategy that was faster reached the even run's final loss" in verdict(setting)
    page = render_report(setting, [])
    assert "<td>–</td>" in page and "not reached in half as many steps again" in page
    assert "not reached" not in render_report(example_setting(), [])
    setting["complete"] = False
    assert "not reached when the run was stopped" in render_report(setting, [])


def test_a_run_that_ended_early_still_gives_a_page(tmp_path: Path) -> None:
    setting = example_setting()
    setting["complete"] = False
    for key in ("exchange_share", "speedup_bound"):
        setting.pop(key)
    # After one round: a few times, one point a curve, no losses at the end.
    for strategy in setting["strategies"]:
        blank = empty_strategy(strategy["name"], strategy["kind"], strategy["kl"], "")
        kept = ("step_s", "tokens_per_s", "exchange_s", "remote_share", "counts_PN", "target_PN")
        blank.update({key: strategy[key] for key in kept}, curve=strategy["curve"][:1])
        strategy.clear()
        strategy.update(blank)
    setting["compute_step_s"] = 0.6  # of a few noisy steps: the bound would be 2, a speed-up is 5
    complete_setting(setting)
    page = render_report(setting, draw_all(setting, tmp_path))
    _parsed(page)
    assert "This run ended early" in page
    # No bound beside speed-ups above it, no praise without the quality, no dash explained wrongly.
    assert "f = 0" not in page and "can gain more than 1/(1 − f) =" not in page
    assert "Preliminary" in page and "times as many tokens" not in page
    assert "not measured before the run was stopped" in page and "not reached" not in page
    # And before any training at all.
    setting["strategies"] = []
    assert "Nothing to compare yet" in render_report(setting, draw_all(setting, tmp_path))


def test_columns_names_and_long_exchanges_are_explained(document: Document) -> None:
    page = render_report(document, [])
    for column in ("over predicted", "alone over predicted", "gradients", "dropped", "foreign"):
        assert f"<b>{column}</b>:" in page, column
    assert "“Steep”: links so slow" in page and "“Published share”: links at which" in page
    assert "python -m tamoe.experiments.quality -o quality.json" in page
    assert "scroll the table sideways" in page
    assert "Longer than predicted" not in page
    setting = example_setting()
    setting["strategies"][-1]["training_over_predicted"] = 3.66
    page = render_report(setting, [])
    assert "Longer than predicted: “bias kl=0.3” 3.7 times" in page
    assert "wait for each other" in page


def test_one_word_for_foreign_text(figures: list[dict[str, str]]) -> None:
    quality = next(figure for figure in figures if figure["name"] == "quality")
    assert "foreign text" in quality["caption"]
    assert "on foreign text" in verdict(example_setting())


def test_names_cannot_inject_markup() -> None:
    setting = example_setting()
    setting["strategies"][1]["name"] = "<script>alert(1)</script>"
    setting["strategies"][1]["auto_reason"] = "<script>alert(2)</script>"
    page = render_report(setting, [])
    assert page.count("&lt;script&gt;alert(2)") == 1 and "<script" not in page


# ---- flat beside hierarchical -----------------------------------------------------------------


def test_both_exchanges_stand_side_by_side() -> None:
    setting = example_setting()
    section = exchanges_section(setting["strategies"])
    assert section in render_report(setting, [])
    _parsed(section)
    for strategy in setting["strategies"]:
        row = next(r for r in section.split("<tr>") if f">{strategy['name']}<" in r)
        flat, relayed = (strategy["exchanges"][kind] for kind in ("flat", "hierarchical"))
        numbers = re.findall(r"<td>([\d.,]+)×?</td>", row)
        assert numbers == [
            f"{flat['tokens_per_s']:,.0f}",
            f"{1 - 0.15 / flat['step_s']:.2f}",
            f"{relayed['tokens_per_s']:,.0f}",
            f"{1 - 0.15 / relayed['step_s']:.2f}",
            f"{flat['step_s'] / relayed['step_s']:.2f}",
        ]
        assert f"<td>{strategy['auto_exchange']}</td>" in row and strategy["auto_reason"] in row


def test_a_wrong_choice_of_auto_is_said() -> None:
    timed = example_setting()["strategies"]
    assert exchanges_verdict(timed) == (
        "Hierarchical trains 0.82 to 1.33 times the tokens a second of flat (emulated). auto takes "
        "the faster of the two, or one within 5%, for 4 of 5 strategies; not for “even” "
        "(hierarchical is 1.33 times as fast)."
    )
    timed[0]["auto_exchange"], timed[4]["auto_exchange"] = "hierarchical", "hierarchical"
    assert exchanges_verdict(timed).endswith(
        "for 4 of 5 strategies; not for “bias kl=0.3” (flat is 1.22 times as fast)."
    )
    assert "flat is" not in exchanges_verdict(timed[:2])


def test_a_file_from_before_both_exchanges_still_gives_page_and_figures(tmp_path: Path) -> None:
    setting = example_setting()
    for strategy in setting["strategies"]:
        for key in ("exchanges", "auto_exchange", "auto_reason"):
            del strategy[key]
    complete_setting(setting)
    assert setting["strategies"][0]["training_over_predicted"] == pytest.approx(1 / 0.9)
    assert {f["name"] for f in draw_all(setting, tmp_path)} == FIGURES - {"exchanges"}
    page = render_report(setting, [])
    assert "<h3>Flat beside hierarchical" not in page
    assert "The flat exchange takes f =" in page


def test_a_run_that_ended_early_has_both_speeds_and_no_shares() -> None:
    setting = example_setting()
    for strategy in setting["strategies"]:
        for timed in strategy["exchanges"].values():
            del timed["exchange_share"]
    assert exchanges_section(setting["strategies"]).count("<td>–</td>") == 10
    speeds, *shares = exchanges_figure(setting, setting["strategies"]).axes
    assert not shares and len(speeds.patches) == 10


def test_the_figure_has_the_numbers_and_marks_what_auto_takes() -> None:
    setting = example_setting()
    speeds, shares = exchanges_figure(setting, setting["strategies"]).axes
    for axes, key, scale in ((speeds, "tokens_per_s", 1e-3), (shares, "exchange_share", 1.0)):
        drawn = [patch.get_width() for patch in axes.patches]
        kinds = ("flat", "hierarchical")
        assert drawn == [
            scale * s["exchanges"][k][key] for k in kinds for s in setting["strategies"]
        ]
    texts = [text.get_text() for text in speeds.texts]
    assert [text.endswith("auto") for text in texts] == [
        strategy["auto_exchange"] == kind
        for kind in ("flat", "hierarchical")
        for strategy in setting["strategies"]
    ]


def test_the_tables_of_the_log_have_a_row_for_each_complete_strategy(document: Document) -> None:
    unfinished = {**example_setting("top-8", "2x4:200mbit"), "exchange_share": None}
    text = tables({**document, "settings": [*document["settings"], unfinished]})
    assert "2x4" not in text
    for cluster in ("4x2:50mbit", "4x2:160mbit"):
        assert f"| {cluster} | even | flat | 6,827, 0.88 | 9,102, 0.83 |" in text
        assert f"| {cluster} | 0.88, 8.0x | bias kl=0.3 | 5.45x | 0.95 |" in text
    assert text.count("\n| ") == 2 * (2 * len(STRATEGIES)) + 1


def test_the_flat_exchange_is_what_predictions_are_compared_with() -> None:
    strategy = example_setting()["strategies"][1]
    assert strategy["auto_exchange"] == "hierarchical"
    assert strategy["exchange_s"] == pytest.approx(0.75)
    assert strategy["training_over_predicted"] == pytest.approx(1 / 0.9)


def test_a_page_that_would_be_too_large_is_refused(tmp_path: Path) -> None:
    figure = {"setting": "steep", "title": "t", "caption": "c", "data_uri": "x" * 5_000_000}
    with pytest.raises(InputError, match="allowed: 5,000,000"):
        write_report(example_setting(), [figure], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_time_to_a_loss_agrees_with_a_fine_search_along_the_curve() -> None:
    curve = [
        {"time_s": t, "val_loss": v} for t, v in ((0.0, 4.0), (3.0, 2.5), (5.0, 2.6), (9.0, 2.0))
    ]
    for loss in (4.5, 4.0, 3.3, 2.65, 2.55, 2.45, 2.0):
        # Walk along the straight pieces in small steps; the last step above ends the wait.
        found = 0.0
        for before, after in itertools.pairwise(curve):
            for part in range(10_001):
                value = before["val_loss"] + part / 1e4 * (after["val_loss"] - before["val_loss"])
                if value > loss + 1e-12:
                    found = before["time_s"] + part / 1e4 * (after["time_s"] - before["time_s"])
        assert time_to_loss(curve, loss) == pytest.approx(found, abs=1e-3)
    assert time_to_loss(curve, 1.9) is None
    # One lucky point does not count, neither for the even run nor for another.
    assert time_to_loss([*curve, {"time_s": 12.0, "val_loss": 2.2}], 2.1) is None
    assert time_to_loss([], 1.0) is None


def test_speed_ups_share_and_bound_follow_from_the_measurements() -> None:
    setting = example_setting()
    even, *_, strong = setting["strategies"]
    assert setting["exchange_share"] == pytest.approx(1 - 0.15 / 1.2)
    assert setting["speedup_bound"] == pytest.approx(1.2 / 0.15)
    assert even["speedup_over_even"] == even["speedup_to_even_loss"] == 1.0
    assert strong["speedup_over_even"] == pytest.approx(1.2 / 0.22)
    assert strong["time_to_even_loss_s"] > 48 * 0.22  # it costs more steps than the even run took
    assert 1 < strong["speedup_to_even_loss"] < strong["speedup_over_even"]
    assert strong["speedup_over_even"] < setting["speedup_bound"]
