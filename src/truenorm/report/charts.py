"""Charts: drawings of records, ready for the page, with the words that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truenorm._records import study_drawings
from truenorm._records.drawings.drawing import Drawing, Drawn, Message
from truenorm._records.recalibration import Gap, gaps_drawn
from truenorm._records.study import Study
from truenorm.report._svg import svg

_MOST_SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class Chart:
    """A drawing for the report, with the words that stand for it.

    Args:
        title: What is drawn; shown above the chart.
        alt: What the chart shows, for those who do not see it.
        svg: The drawing, a whole SVG document.
        narrow: The same for a phone's width; empty where ``svg`` serves both.
        notes: Sentences below the chart: how to read it, and what is missing from it.
    """

    title: str
    alt: str
    svg: str
    narrow: str = ""
    notes: tuple[str, ...] = ()


def picture(record: Drawn | Drawing) -> Chart:
    """The picture of a record, the same that its ``plot`` draws.

    Args:
        record: A record with a picture, or one of a study's drawings.
    """
    drawing = record if isinstance(record, Drawing) else record.drawing()
    return _chart(drawing.title, [drawing])


def learning_curves(study: Study, metric: str, *, bands: bool = False) -> Chart:
    """A metric over the epochs: per position the mean over the seeds, and each seed behind it.

    Args:
        study: The study.
        metric: A name in the trials' histories, such as ``val_accuracy`` or ``loss``.
        bands: Draw the 95% interval of the mean in place of each seed's line.

    Returns:
        The chart. What the study judges by, with recalibrated statistics, stands beside the curves.

    Raises:
        OptionError: No trial recorded this metric.
    """
    return picture(study_drawings.curves(study, metric, bands=bands))


def comparison(study: Study, metric: str) -> Chart:
    """The positions against each other: the value of every seed, and the paired differences.

    Args:
        study: The study.
        metric: A name in the trials' histories and in the study's comparisons.

    Returns:
        The chart. With one position there is nothing to compare and only its values are drawn.

    Raises:
        OptionError: No trial recorded this metric.
    """
    parts = [study_drawings.values(study, metric)]
    some = not isinstance(parts[0], Message)
    if some and any(c.metric == metric for c in study.comparisons):
        parts.append(study_drawings.differences(study, metric))
    stacked = len(study.summaries) > _MOST_SIDE_BY_SIDE
    return _chart(f"{metric}: the same seeds compared", parts, stacked=stacked)


def gaps(before: Sequence[Gap], after: Sequence[Gap] = ()) -> Chart:
    """How far each layer's moving statistics are from the population, before and after.

    Args:
        before: The gaps before recalibration.
        after: The gaps after it, by the same paths; may be empty.

    Returns:
        The chart, with a logarithmic axis that has a place for zero. Of many layers those that
        were furthest off are drawn.
    """
    return picture(gaps_drawn(before, after))


def _chart(title: str, drawings: Sequence[Drawing], *, stacked: bool = False) -> Chart:
    alt = " ".join(drawing.alt for drawing in drawings)
    wide, narrow = (
        svg(drawings, narrow=small, stacked=stacked, title=title, alt=alt)
        for small in (False, True)
    )
    notes = dict.fromkeys(note for drawing in drawings for note in drawing.notes)
    return Chart(title, alt, wide, narrow, tuple(notes))
