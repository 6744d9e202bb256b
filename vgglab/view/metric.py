"""Format a metric of a report, or say why it was not measured."""

from __future__ import annotations

from typing import Any, Mapping


def metric(report: Mapping[str, Any], name: str, form: str = ".2f", factor: float = 1.0) -> str:
    """Return ``report[name]`` times ``factor`` in the format ``form``, or "not measured (<reason>)"."""
    value = report[name]
    return f"not measured ({reason_not_measured(report)})" if value is None else f"{factor * value:{form}}"


def reason_not_measured(report: Mapping[str, Any]) -> str:
    """Return the most likely reason why a run reports no speed or no memory."""
    if report["simulated"]:
        return "a simulated card has no speed"
    if not report["num_measured_steps"]:
        return f"all steps fell within --skip-steps {report['skip_steps']}"
    return f"not available on {report['device']}"
