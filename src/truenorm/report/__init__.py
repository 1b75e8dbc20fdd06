"""Reports: records and charts as one HTML file that needs nothing else.

``page`` makes the page, ``charts`` what is drawn on it (``_curves``, ``_pairs`` and ``_gaps``
paint, ``_canvas`` is what all drawings share), ``study`` the report of a study.
"""

from __future__ import annotations

from truenorm.report.charts import Chart, comparison, gaps, learning_curves
from truenorm.report.page import Section, report, save
from truenorm.report.study import study_page

__all__ = [
    "Chart",
    "Section",
    "comparison",
    "gaps",
    "learning_curves",
    "report",
    "save",
    "study_page",
]
