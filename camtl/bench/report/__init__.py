"""Reports of benchmark records: a page, Markdown tables, pictures."""

from camtl.bench.report.html import render, write_html
from camtl.bench.report.images import images, write_images
from camtl.bench.report.markdown import markdown_table, put_into, summary_list, targets_table

__all__ = [
    "images",
    "markdown_table",
    "put_into",
    "render",
    "summary_list",
    "targets_table",
    "write_html",
    "write_images",
]
