"""The report on a data set: `write_report` writes report/stats.json and report/index.html beside the shards."""

from pipelines.report.page import INDEX, STATS, write_report
from pipelines.report.stats import compute_stats, images_per_second

__all__ = ["INDEX", "STATS", "compute_stats", "images_per_second", "write_report"]
