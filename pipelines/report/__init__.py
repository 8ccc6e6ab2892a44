"""The report on a data set: `write_report` writes index.html, stats.json and stats.parquet under
report/.
"""

from pipelines.report.page import write_report
from pipelines.report.runs import images_per_second
from pipelines.report.stats import compute_stats

__all__ = ["compute_stats", "images_per_second", "write_report"]
