"""Reports on depth quality: files or folders against ground truth, and two such reports against each other."""

from ddfup.report.batch import BATCH_FILES, batch_report, is_batch_report
from ddfup.report.compare import Comparison, compare, write_comparison
from ddfup.report.evaluation import Options
from ddfup.report.pairs import Sample, find_samples
from ddfup.report.results import Report, Row, read_report
from ddfup.report.run import check_outputs, write_report

__all__ = [
    "BATCH_FILES",
    "Comparison",
    "Options",
    "Report",
    "Row",
    "Sample",
    "batch_report",
    "check_outputs",
    "compare",
    "find_samples",
    "is_batch_report",
    "read_report",
    "write_comparison",
    "write_report",
]
