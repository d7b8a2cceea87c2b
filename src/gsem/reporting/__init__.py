"""Reports of runs: an HTML page, Markdown, a JSON card. Only `visuals` and `report` run a model."""

from gsem.reporting.read import RunReport as RunReport
from gsem.reporting.read import read_runs as read_runs
from gsem.reporting.report import cards as cards
from gsem.reporting.report import html as html
from gsem.reporting.report import markdown as markdown
from gsem.reporting.visuals import Pictures as Pictures
