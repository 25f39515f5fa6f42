"""Results as one web page that needs no network: table first, then what it means, then figures."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tamoe.report_exchanges import exchanges_section
from tamoe.topology.errors import InputError
from tamoe.topology.units import format_time

MAX_REPORT_BYTES = 5_000_000
Setting = Mapping[str, Any]
_LONG = 2.0  # times its prediction, from where on an exchange is explained
_NAMES = {
    "steep": "“Steep”: links so slow that the exchange takes most of the even step.",
    "published share": "“Published share”: links at which the exchange takes about the part of "
    "the even step that was published for real clusters (up to 67 %).",
    "top-8": "“Top-8”: eight experts a token on two nodes. A token's experts share nodes, which is "
    "where the hierarchical exchange pays. A short run, for its times.",
    "your cluster": "“Your cluster”: the one that --cluster named.",
}


def write_report(
    results: Mapping[str, Any],
    figures: Sequence[Mapping[str, str]],
    path: str | os.PathLike[str],
) -> Path:
    """Write the page.

    Parameters
    ----------
    results
        Document of schema ``tamoe.results``. One that ends early gives a page that says so.
    figures
        Each with ``setting``, ``title``, ``caption`` and ``data_uri``; shown in this order.
    path
        The ``.html`` file.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    InputError
        The file cannot be written, or would take more than 5 MB.
    """
    page = render_report(results, figures).encode()
    if len(page) > MAX_REPORT_BYTES:
        raise InputError(
            f"the report has {len(page):,} bytes; allowed: {MAX_REPORT_BYTES:,}. Leave out figures"
        )
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(page)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from None
    return target


def render_report(results: Mapping[str, Any], figures: Sequence[Mapping[str, str]]) -> str:
    """The page as text.

    Examples
    --------
    >>> setting = {"setting": "steep", "cluster": "4x2:50mbit", "strategies": [], "steps": 0}
    >>> "emulated" in render_report(setting, [])
    True
    """
    settings = [results, *results.get("settings", ())]
    body = "\n".join(_section(setting, figures) for setting in settings)
    notice = ""
    if not all(setting.get("complete") for setting in settings):
        notice = '<p class="notice">This run ended early; the page shows what was measured.</p>'
    return _PAGE.format(
        style=_STYLE,
        notice=notice,
        body=body,
        made=_made(results),
        command=html.escape(results.get("command", "tamoe demo")),
    )


# ---- one setting ------------------------------------------------------------------------------


def _section(setting: Setting, figures: Sequence[Mapping[str, str]]) -> str:
    title = f"{setting['cluster']} – {setting['setting']}"
    shown = [figure for figure in figures if figure["setting"] == setting["setting"]]
    return (
        f"<section><h2>{html.escape(title)} <small>emulated</small></h2>\n"
        f"<p>{html.escape(_setting_text(setting))}</p>\n"
        f"{_table(setting['strategies'])}\n"
        f"{_dashes(setting)}{_over_predicted(setting)}"
        f'<p class="verdict">{html.escape(verdict(setting))}</p>\n'
        f"{exchanges_section(setting['strategies'])}"
        + "\n".join(_figure(figure) for figure in shown)
        + "</section>"
    )


def _dashes(setting: Setting) -> str:
    """What the dashes of this table mean, if it has any."""
    strategies = setting["strategies"]
    if not strategies:
        return ""
    if any(s.get("val_loss_own") is None for s in strategies):
        text = (
            "– : not measured before the run was stopped. Without losses at equal steps nothing "
            "can be said of the exchange's share f, of its bound or of the cost in quality."
        )
    elif all(s.get("speedup_to_even_loss") for s in strategies):
        return ""
    elif setting.get("complete"):
        text = "– under “to even’s loss”: not reached in half as many steps again."
    else:
        text = "– under “to even’s loss”: not reached when the run was stopped."
    return f'<p class="note">{html.escape(text)}</p>\n'


def _over_predicted(setting: Setting) -> str:
    """Why some exchanges took so much longer than the cost model says, if any did."""
    long = [s for s in setting["strategies"] if (s.get("training_over_predicted") or 0) > _LONG]
    if not long:
        return ""
    found = ", ".join(
        f"{_capital(s['name'])} {s['training_over_predicted']:.1f} times" for s in long
    )
    text = (
        f"Longer than predicted: {found}. These exchanges are short, and ranks that share a few "
        f"cores wait for each other in them, which the cost model knows nothing of."
    )
    return f'<p class="note">{html.escape(text)}</p>\n'


def _setting_text(setting: Setting) -> str:
    work = setting.get("workload", {})
    parts = [_NAMES[setting["setting"]]] if setting["setting"] in _NAMES else []
    if work:
        parts.append(
            f"{work['num_ranks']} ranks on {len(setting['nodes'])} nodes, {work['num_blocks']} MoE "
            f"layers of {work['num_experts']} experts, top-{work['top_k']}, hidden size "
            f"{work['hidden_size']}, {work['tokens_per_rank']:,} tokens a rank and step, "
            f"{setting['steps']} steps a strategy."
        )
    if setting.get("exchange_share") is not None:
        even: Setting = next((s for s in setting["strategies"] if s["name"].startswith("even")), {})
        kind = even.get("auto_exchange") or "flat"
        parts.append(
            f"The {kind} exchange takes f = {setting['exchange_share']:.2f} of the even step, so "
            f"no exchange can gain more than 1/(1 − f) = {setting['speedup_bound']:.2f}×."
        )
    return " ".join(parts)


def _table(strategies: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th title='{html.escape(why)}'>{name}</th>" for name, _, _, why in _COLUMNS)
    rows = []
    for strategy in strategies:
        cells = "".join(f"<td>{_cell(strategy.get(key), how)}</td>" for _, key, how, _ in _COLUMNS)
        name = html.escape(strategy["name"])
        rows.append(f"<tr><th scope='row'>{name}</th>{cells}</tr>")
    return (
        f"<p class='note'>{1 + len(_COLUMNS)} columns; in a narrow window, scroll the table "
        "sideways →</p><div class='scroll' tabindex='0'><table><thead><tr><th>strategy</th>"
        + head
        + "</tr></thead><tbody>"
        + "".join(rows)
        + "</tbody></table></div>"
    )


# (heading, key, format, what it means)
_COLUMNS: tuple[tuple[str, str, str, str], ...] = (
    ("tokens/s", "tokens_per_s", "{:,.0f}", "all ranks together, with the exchange that auto "
     "takes, emulated"),
    ("over even", "speedup_over_even", "{:.2f}×", "tokens per second over the even strategy"),
    ("to even’s loss", "speedup_to_even_loss", "{:.2f}×", "time of the even run over the time to "
     "its final validation loss; contains the cost in quality"),
    ("loss, own", "val_loss_own", "{:.3f}", "validation loss at equal steps on own ranks"),
    ("vs even", "val_loss_over_even", "{:+.1%}", "validation loss on own ranks against even"),
    ("foreign", "val_loss_foreign", "{:.3f}", "loss on foreign text: that of the next node"),
    ("unsteered", "val_loss_no_bias", "{:.3f}", "loss with the steering removed"),
    ("over node links", "remote_share", "{:.1%}", "share of dispatched bytes that leave the node"),
    ("dropped", "dropped_share", "{:.1%}", "share of the gate's choices that capacity dropped"),
    ("step", "step_s", "time", "median, emulated"),
    ("exchange", "exchange_s", "time", "a step, measured in training, emulated"),
    ("over predicted", "training_over_predicted", "{:.2f}", "the flat exchange in training over "
     "the cost model's time for its counts; ranks share cores and wait for each other"),
    ("alone over predicted", "alone_over_predicted", "{:.2f}", "the same counts exchanged flat "
     "with nothing else running, over the cost model's time for that"),
    ("gradients", "allreduce_s", "time", "averaging of dense gradients, a step, emulated"),
)  # fmt: skip


def _cell(value: float | None, how: str) -> str:
    if value is None:
        return "–"
    return format_time(value) if how == "time" else how.format(value)


def verdict(setting: Setting) -> str:
    """What was gained and what it cost, in plain words.

    Parameters
    ----------
    setting
        A setting of the results document.

    Returns
    -------
    str
        One paragraph.
    """
    rated = [
        s
        for s in setting["strategies"]
        if not s["name"].startswith("even") and s.get("speedup_over_even")
    ]
    if not rated:
        return "Nothing to compare yet: no strategy besides the even one was measured."
    if all(s.get("val_loss_own") is None for s in rated):
        return (
            f"Preliminary: the run was stopped after {setting['steps']} steps a strategy, before "
            f"any loss was compared, so what the speed cost in quality is not known and the "
            f"speeds are those of a few steps."
        )
    best = max(rated, key=lambda s: s["speedup_to_even_loss"] or s["speedup_over_even"] / 1e3)
    text = (
        f"{_capital(best['name'])} trained {best['speedup_over_even']:.1f} times as many tokens a "
        f"second as even dispatch; {best['remote_share']:.0%} of its bytes crossed node links"
    )
    even = next((s for s in setting["strategies"] if s["name"].startswith("even")), None)
    if even and even.get("remote_share") is not None:
        text += f" in place of {even['remote_share']:.0%}"
    text += ". "
    if best.get("val_loss_over_even") is not None:
        text += _cost(best)
    if best.get("speedup_to_even_loss"):
        text += (
            f" To the even run's final loss it took 1/{best['speedup_to_even_loss']:.2f} of the "
            f"time; that number contains the cost in quality."
        )
    elif best.get("val_loss_own") is not None:
        text += " No strategy that was faster reached the even run's final loss in this run."
    return text


def _cost(best: Mapping[str, Any]) -> str:
    change = best["val_loss_over_even"]
    own = "worse" if change > 0 else "better"
    text = f"After as many steps its validation loss was {abs(change):.1%} {own} than even's"
    foreign, unsteered = best.get("val_loss_foreign"), best.get("val_loss_no_bias")
    if foreign is not None and unsteered is not None:
        text += (
            f" ({best['val_loss_own']:.3f} nats a byte; {foreign:.3f} on foreign text, "
            f"{unsteered:.3f} with the steering removed)"
        )
    return text + "."


def _capital(name: str) -> str:
    return f"“{name}”"


def _figure(figure: Mapping[str, str]) -> str:
    title, caption = html.escape(figure["title"]), html.escape(figure["caption"])
    return (
        f"<figure><img src='{figure['data_uri']}' alt='{title}, emulated'>"
        f"<figcaption><b>{title}.</b> {caption}</figcaption></figure>"
    )


def _made(results: Mapping[str, Any]) -> str:
    made = results.get("made", {})
    rows = "".join(
        f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in made.items()
    )
    return f"<dl>{rows}</dl>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tamoe: what topology-aware routing gains here, and what it costs</title>
<style>{style}</style></head>
<body><main>
<h1>What topology-aware routing gains here, and what it costs</h1>
<p class="lead">A small Mixture-of-Experts language model was trained on one machine whose ranks
talk over <b>emulated</b> links: real traffic, shaped to the rates below. Same data order, same
initial weights, strategies in turns.</p>
{notice}
{body}
<section><h2>How to read it</h2>
<ul>
<li><b>emulated</b>: measured with real traffic on shaped links. <b>simulated</b>: computed by the
cost model.</li>
<li><b>f</b> is the exchange's share of the even step, from the same step with its exchange removed:
no rows move, counts are not agreed on and experts are evenly loaded. No way to exchange can gain
more than 1/(1 − f). The f of any other strategy or exchange is its step's against that same step
without exchange.</li>
<li><b>flat</b> sends every row straight to its expert; <b>hierarchical</b> sends a token once over
the link of each node and copies it there. Results are equal to the last bit, so the steps of one
training take both in turns. <b>auto</b> takes the one that the cost model says is faster for the
plan, hierarchical only from a gain of 10 % on, as the model knows no more than the links here; all
other numbers of a strategy are those of the exchange that auto takes.</li>
<li><b>to even’s loss</b> is the honest speed-up: training time until the validation loss stays at
or below the one that the even run ended with.</li>
<li>Every rank trains on windows from the whole text. <b>own</b>: each rank routes its own stretch
of held-out text; <b>foreign</b>: the stretch of the next node's ranks. <b>unsteered</b>: the bias
is zero; where each rank has a gate of its own, the mean of all gates routes.</li>
<li><b>dropped</b>: share of the gate's choices that were over an expert's capacity and got no
expert.</li>
<li><b>over predicted</b>: the flat exchange in training over the cost model's time for the same
counts; 1 is a perfect prediction. <b>alone over predicted</b>: the same with nothing else
running.</li>
<li><b>gradients</b>: the part of a step that averages the gradients of what is not an expert.</li>
<li>A few minutes of training show speed, not final quality. A longer run with several seeds shows
quality: <code>python -m tamoe.experiments.quality -o quality.json</code> makes one; the
repository has its results in <code>experiments/quality.json</code>.</li>
</ul></section>
<section><h2>How it was made</h2><pre>{command}</pre>{made}</section>
</main></body></html>
"""

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2125;--soft:#5f6368;--line:#d9dce0;--page:#fbfbfa;
--card:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e7e9;--soft:#a5abb2;--line:#3a3f45;--page:#16181a;
--card:#1e2124}}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:74rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .75rem}h2{font-size:1.3rem;margin:2.75rem 0 .5rem}
small{font-weight:400;color:var(--soft);font-size:.75em}
p,ul{max-width:46rem}.lead{font-size:1.05rem;color:var(--soft)}
.verdict{border-left:4px solid #0072b2;padding-left:1rem;font-size:1.05rem}
.note{color:var(--soft);font-size:.86rem}
.notice{border-left:4px solid #d55e00;padding-left:1rem}
.scroll{overflow-x:auto;max-width:100%;margin:.25rem 0 1rem;border:1px solid var(--line);
border-radius:6px;background:var(--card)}
.scroll tbody th,.scroll thead tr:first-child th:first-child{position:sticky;left:0;
background:var(--card)}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;
width:100%;min-width:68rem}
th,td{padding:.45rem .4rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--soft);font-weight:500;white-space:normal;vertical-align:bottom;line-height:1.2}
thead tr:first-child th:first-child,tbody th{text-align:left}
h3{font-size:1.05rem;margin:1.5rem 0 .4rem}
.exchanges{min-width:56rem}.exchanges [colspan]{text-align:center}
td.why,th.why{text-align:left;white-space:normal;min-width:20rem}
figure{margin:1.75rem 0}figure img{width:100%;height:auto;background:#fff;border-radius:6px;
border:1px solid var(--line);box-sizing:border-box;padding:.5rem}
figcaption{color:var(--soft);font-size:.9rem;max-width:46rem;margin-top:.4rem}
figcaption b{color:var(--ink)}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.7rem 1rem;
overflow-x:auto}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.25rem;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
"""
