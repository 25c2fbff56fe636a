"""A plan where it is the last line of a notebook's cell: the answer and its numbers, styled by nothing but itself."""

from __future__ import annotations

from html import escape

from autoplan.plan import Plan
from autoplan.report import facts, pipeline

_BOX = "font-family:system-ui,sans-serif;max-width:52em;border:1px solid #8886;border-radius:8px;padding:12px 16px"


def card(plan: Plan) -> str:
    """A fragment of HTML that follows the notebook's own light or dark colours."""
    head = facts.headline(plan)
    numbers = (
        ("step", head.step_time),
        ("tokens/s", head.throughput),
        ("MFU", head.mfu),
        ("memory", f"{head.memory} of {head.limit}"),
        ("speed-up", f"{head.speedup} over {head.speedup_over}" if head.speedup != "-" else head.speedup_over),
    )
    cells = "".join(
        f'<span style="display:inline-block;margin-right:1.6em"><span style="opacity:.65">{escape(name)}</span> '
        f"<b>{escape(text)}</b></span>"
        for name, text in numbers
    )
    stages = pipeline.stages_line(plan)
    notes = "".join(f'<div style="opacity:.75;margin-top:4px">{escape(text)}</div>' for text in (stages, head.proof) if text)
    return f'<div style="{_BOX}"><div style="font-weight:600;margin-bottom:8px">{escape(head.answer)}</div>{cells}{notes}</div>'
