"""Reports of runs: an HTML page, Markdown, a JSON card. Only `visuals` and `report` run a model."""

from gsem.reporting.page import cards as cards
from gsem.reporting.page import html as html
from gsem.reporting.page import markdown as markdown
from gsem.reporting.read import read_runs as read_runs
from gsem.reporting.views import Pictures as Pictures
from gsem.reporting.views import RunReport as RunReport
from gsem.reporting.views import Shown as Shown
from gsem.reporting.views import Surface as Surface
