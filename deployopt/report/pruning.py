"""What a run's prune stages decided and measured: sentences and tables that Markdown and HTML share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deployopt.report import units
from deployopt.report.records import Facts, told
from deployopt.report.summary import EARLIER, Report

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
NAMED = 6  # groups or layers in a sentence, of one kind


def variants(report: Report) -> list[tuple[str, Facts, bool]]:
    """(variant, what of its record's "pruning" can be told, whether it comes from the cache), in trunk order; without those of which nothing can."""
    found = ((v["name"], told(v, "pruning"), bool(v.get("cached"))) for v in report["variants"])
    return [(name, facts, cached) for name, facts, cached in found if facts]


def is_faster(found: Facts) -> bool:
    """Whether the interval of the latency ratio lies below 1; without an interval (too few blocks), or a ratio, nothing is shown."""
    return found.get("ratio_ci95") is not None and found["ratio_ci95"][1] < 1


def warning(facts: Facts) -> str | None:
    """What the stage warns of: a cut network that is not shown to be faster than the uncut one. None if it is, or was not to be timed."""
    found = facts.get("against_parent")
    return None if not found or is_faster(found) else against_parent(found)


def warnings(report: Report) -> list[tuple[str, str]]:
    """(variant, warning) of those that have one; for a cached variant it says that the timing is an earlier run's."""
    found = ((name, warning(facts), cached) for name, facts, cached in variants(report))
    return [(name, f"{told} ({EARLIER})" if cached else told) for name, told, cached in found if told is not None]


def against_parent(found: Facts) -> str:
    """How the cut network's latency compares with the uncut one's, in a sentence."""
    where = f"on {found['backend']} at batch {found['batch']}"
    if "ratio" not in found:
        return f"whether it is faster than the uncut network {where} is not known: {found['reason']}"
    interval = found["ratio_ci95"]
    judged = "faster than" if is_faster(found) else "slower than" if interval and interval[0] > 1 else "not shown to be faster than"
    shown = f"95 % {units.interval(interval)}, " if interval else ""
    disturbed = f"; disturbed: {found['invalid']}" if found["invalid"] else ""
    return f"{judged} the uncut network {where}: {found['ratio']:.3f} of its p50 ({shown}{found['blocks']} blocks, FP32, before recovery{disturbed})"


def sentences(facts: Facts, cached: bool) -> list[str]:
    """What was wanted, what was reached, and what was chosen on the way: of each what is known.

    Args:
        cached: the facts are of an earlier run; latencies among them are then not told as new.
    """
    outcome = [f"target {_target(facts['target'])}"] if "target" in facts else []
    if "reached" in facts:
        outcome.append(f"kept {100 * facts['reached']['macs']:.1f} % of the MACs, {100 * facts['reached']['params']:.1f} % of the parameters")
    said = ["; ".join(outcome)] if outcome else []
    alignment = facts.get("alignment", {})
    if "p50_ms" in alignment:
        timed = ", ".join(f"{key}: {units.milliseconds(ms)}" for key, ms in alignment["p50_ms"].items())
        best, chosen = alignment.get("fastest", alignment["round_to"]), alignment["round_to"]
        judged = "the fastest" if best == chosen else f"not shown to be slower than {best}, the fastest,"
        said.append(f"channels of cut groups are multiples of {chosen}, {judged} on {alignment['backend']} at batch {alignment['batch']} in FP32 ({timed})")
    if "sparse" in facts:
        small = facts["sparse"]["small_channels"]
        said.append(
            f"sparse training: channels under 1 % of their group's largest norm went from {100 * small['before']:.1f} % to {100 * small['after']:.1f} %"
        )
    if (whole := facts.get("whole")) and whole["left"]:
        said.append(_left_whole(whole))
    if plain := facts.get("parametrizations_removed"):
        said.append(f"weights were trained as such, without what parametrised them, in {units.listed(plain, NAMED)}")
    if "against_parent" in facts:
        said.append(against_parent(facts["against_parent"]))
    if cached and ("p50_ms" in alignment or facts.get("latency") or "ratio" in facts.get("against_parent", {})):
        said.append(f"these latencies were {EARLIER}")
    return said


def _left_whole(found: Facts) -> str:
    reasons: dict[str, list[str]] = {}
    for group in found["left"]:
        reasons.setdefault(group["why"], []).append(f"{group['name']} ({group['channels']})")
    told = ", ".join(f"{units.listed(names, NAMED)}, since {why}" for why, names in reasons.items())
    return f"{len(found['left'])} of {units.plural(found['groups'], 'group')} of channels stayed whole: {told}"


def _target(target: Facts) -> str:
    latency = target.get("latency")
    if latency is None:
        return ", ".join(f"{metric} ratio {ratio:.3g}" for metric, ratio in target.items())
    wanted = f"{latency['ratio']:.3g} of the latency" if "ratio" in latency else units.milliseconds(latency.get("ms"))
    return f"{wanted} on {latency['backend']} at batch {latency['batch']} in FP32"


def trace(facts: Facts) -> Table | None:
    """Every measurement of the search for a latency, in order."""
    headers = ["iteration", "goal", "MACs kept", "of the parent's p50", "95 %", "p50", "parent's p50", "blocks", "note"]
    rows = []
    for search in facts.get("latency") or []:
        for t in search["trace"]:
            note = "; ".join(n for n in ("confirming" if t["confirming"] else "", f"disturbed: {t['invalid']}" if t["invalid"] else "") if n)
            latencies = (units.milliseconds(t["ms"]), units.milliseconds(t["parent_ms"]))
            share = (f"{100 * t['macs_ratio']:.1f} %", f"{t['ratio']:.3f}", units.interval(t["ratio_ci95"]))
            rows.append([str(search["iteration"]), units.significant(search["goal"]), *share, *latencies, str(t["blocks"]), note])
    return (headers, rows) if rows else None


def sensitivity(facts: Facts, task: Mapping[str, Any]) -> Table | None:
    """The validation score with one group cut alone."""
    found = facts.get("sensitivity")
    if found is None:
        return None
    headers = ["group", "channels", *(f"{100 * r:g} % cut" for r in found["ratios"])]
    return headers, [[g["name"], str(g["channels"]), *(units.score(s, task) for s in g["scores"])] for g in found["groups"]]


def lead(found: Facts, task: Mapping[str, Any]) -> str:
    """What a table of sensitivity shows."""
    name = units.metric_name(found["metric"])
    return f"Validation {name} ({found['n']} images) after cutting one group of channels alone, without training; uncut {units.score(found['whole'], task)}."
