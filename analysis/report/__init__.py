"""HTML pages about a run, each one file: the report, and the page of errors. Drawn from stored files alone."""

from onceover.analysis.report.document import ReportError, check_report, write_report
from onceover.analysis.report.errors import error_page
from onceover.analysis.report.files import ReportFiles, open_files

__all__ = ["ReportError", "ReportFiles", "check_report", "error_page", "open_files", "write_report"]
