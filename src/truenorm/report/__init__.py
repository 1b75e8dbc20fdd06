"""Reports: records and charts as one HTML file that needs nothing else.

``page`` makes the page, ``charts`` the pictures on it (the records' own drawings, as SVG),
``study`` the report of a study.
"""

from __future__ import annotations

from truenorm.report.charts import Chart, comparison, gaps, learning_curves, picture
from truenorm.report.page import Section, report, save
from truenorm.report.study import study_page

__all__ = [
    "Chart",
    "Section",
    "comparison",
    "gaps",
    "learning_curves",
    "picture",
    "report",
    "save",
    "study_page",
]
