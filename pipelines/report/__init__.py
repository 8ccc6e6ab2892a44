"""The report on a data set: `write_report` writes index.html, stats.json and stats.parquet into its
folder report/.
"""

from pipelines.report.page import write_report
from pipelines.report.runs import images_per_second

__all__ = ["images_per_second", "write_report"]
